"""Device functions of all sweeps over S = image @ text^T.

`similarities` makes every tile of S, so all kernels of a loss see the same bits: it adds ascending chunks of DEPTH
channels into one float32 accumulator, in the type of the embeddings (float32 without TF32). Tiles are r x c with
r = ROWS and c = COLUMNS, WIDTH is D. UPCAST is for the interpreter, whose products of 16-bit floats are wrong.
Indices named inner_... are clamped into the matrix, so that loads need no mask.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(x_ptr, at, WIDTH: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr):
    """Rows `at` (r,) of the contiguous x (any, WIDTH): (r, DEPTH), WIDTH <= DEPTH, padded with zeros."""
    k = tl.arange(0, DEPTH)
    pointers = x_ptr + at.to(tl.int64)[:, None] * WIDTH + k[None, :]
    if WIDTH == DEPTH:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=(k < WIDTH)[None, :], other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def resident_rows(x_ptr, at, WIDTH: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr):
    """The rows that a sweep loads once, if one chunk holds all of D; else a placeholder."""
    if WIDTH <= DEPTH:
        resident = load_rows(x_ptr, at, WIDTH, DEPTH, UPCAST)
    else:
        resident = at
    return resident


@triton.jit
def similarities(
    resident, x_ptr, x_at, y_ptr, y_at, WIDTH: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr
):
    """The tile x[x_at] @ y[y_at]^T, (r, c) float32; x_at (r,), y_at (c,) are inside the matrices."""
    if WIDTH <= DEPTH:
        y = load_rows(y_ptr, y_at, WIDTH, DEPTH, UPCAST)
        s = tl.dot(resident, tl.trans(y), input_precision="ieee")
    else:
        s = tl.zeros((x_at.shape[0], y_at.shape[0]), tl.float32)
        k = tl.arange(0, DEPTH)
        x_pointers = x_ptr + x_at.to(tl.int64)[:, None] * WIDTH + k[None, :]
        y_pointers = y_ptr + y_at.to(tl.int64)[:, None] * WIDTH + k[None, :]
        for start in range(0, WIDTH, DEPTH):
            if WIDTH % DEPTH == 0:
                x = tl.load(x_pointers + start)
                y = tl.load(y_pointers + start)
            else:
                inside = (k < WIDTH - start)[None, :]
                x = tl.load(x_pointers + start, mask=inside, other=0.0)
                y = tl.load(y_pointers + start, mask=inside, other=0.0)
            if UPCAST:
                x = x.to(tl.float32)
                y = y.to(tl.float32)
            s = tl.dot(x, tl.trans(y), s, input_precision="ieee")
    return s


@triton.jit
def positive_column(row, n, offset):
    """The column of each row's positive; -1, which no tile has, for rows beyond the last."""
    return tl.where(row < n, row + offset, -1)


@triton.jit
def within(target, first, COLUMNS: tl.constexpr):
    """(r,) bool: whether a row's positive, in column `target`, lies in the tile that begins at column `first`."""
    return (target >= first) & (target < first + COLUMNS)


@triton.jit
def crosses(first_row, first, offset, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Whether the tile at (first_row, first) can hold positives. Most cannot, and skip the code for them."""
    return (first_row + offset < first + COLUMNS) & (first_row + ROWS + offset > first)


@triton.jit
def different(row_ids, column_ids, row, column, n, m):
    """(r, c) bool: whether a pair lies inside the matrix and has different image ids."""
    return (row < n)[:, None] & (column < m)[None, :] & (row_ids[:, None] != column_ids[None, :])


@triton.jit
def selected(tile, positive):
    """(r,): each row's entry of tile (r, c) at which positive (r, c) is true; 0 without one."""
    return tl.sum(tl.where(positive, tile, 0.0), 1)


@triton.jit
def negatives(
    resident, image, text, text_ids, positive, sign, row, inner_row, row_id, target, first_row, first, n, m, offset,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(column (c,), sign * S (r, c) with -inf for all but negatives) of the tile at (first_row, first).

    Stores sign * S of the positives in the tile to positive (n,). The other arguments: of the program's rows.
    """
    column = first + tl.arange(0, COLUMNS)
    inner_column = tl.minimum(column, m - 1)
    s = sign * similarities(resident, image, inner_row, text, inner_column, WIDTH, DEPTH, UPCAST)
    if crosses(first_row, first, offset, ROWS, COLUMNS):
        is_positive = target[:, None] == column[None, :]
        tl.store(positive + row, selected(s, is_positive), mask=within(target, first, COLUMNS))
        s = tl.where(is_positive, float("-inf"), s)
    column_id = tl.load(text_ids + inner_column)
    return column, tl.where(different(row_id, column_id, row, column, n, m), s, float("-inf"))


@triton.jit
def own_similarities(
    positive, s, is_positive, inner_row, inner_column, SINGLE: tl.constexpr, BOTH: tl.constexpr
):
    """The similarities of the positives of a tile's rows (r,) and, with BOTH, of its columns (c,).

    Read from positive (n,), or with SINGLE from the tile s itself, which is then the only one.
    """
    if SINGLE:
        of_row, of_column = selected(s, is_positive), tl.sum(tl.where(is_positive, s, 0.0), 0)
    else:
        of_row = tl.load(positive + inner_row)
        of_column = of_row
        if BOTH:
            of_column = tl.load(positive + inner_column)
    return of_row, of_column


@triton.jit
def exponent_of(scale_ptr):
    """(sign, factor) with exp(scale * s) = 2^(factor * (sign * s)) and factor > 0, so that -inf stays -inf."""
    scale = tl.load(scale_ptr).to(tl.float32)
    sign = tl.where(scale < 0, -1.0, 1.0)
    # By default a device's maximum drops NaN, and the loss would hide a scale that has become NaN.
    return sign, tl.maximum(tl.abs(scale) * 1.4426950408889634, 1e-30, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def reference_of(top, factor):
    """What to subtract from exponents whose largest is factor * top; 0 if there are none (top = -inf)."""
    return tl.where(top == float("-inf"), 0.0, top) * factor


@triton.jit
def log1p_of(e):
    """log(1 + e) for e in 0..1, exact to a few ulp for every e: 2 artanh(e / (2 + e)) as a series."""
    t = e / (2.0 + e)
    q = t * t
    return (
        2.0 * t * (1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13)))))))
    )


@triton.jit
def softplus_and_sigmoid(z):
    """(log(1 + exp(z)), 1 / (1 + exp(-z))), both exact to a few ulp for every z."""
    e = tl.exp(-tl.abs(z))
    weight = 1.0 / (1.0 + e)
    return tl.maximum(z, 0.0) + log1p_of(e), tl.where(z >= 0, weight, e * weight)


@triton.jit
def softplus_and_sigmoid_2(z):
    """(log2(1 + 2^z), 1 / (1 + 2^-z)), both exact to a few ulp for every z."""
    e = tl.exp2(-tl.abs(z))
    weight = 1.0 / (1.0 + e)
    return tl.maximum(z, 0.0) + 1.4426950408889634 * log1p_of(e), tl.where(z >= 0, weight, e * weight)
