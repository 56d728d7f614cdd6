"""Provides the device functions for sweeps over tiles of the n x m matrix S = image @ text^T.

All kernels of a loss compute S with `similarities`, so they get the same bits. The function adds chunks of
DEPTH channels, in ascending order, to one float32 accumulator. Products have the type of the embeddings (no
TF32). Tiles have r = ROWS rows and c = COLUMNS columns. WIDTH is D. UPCAST is for the interpreter, whose
products of 16-bit floats are wrong. Indices inner_... are clamped into the matrix, so loads need no mask.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(x_ptr, at, WIDTH: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr):
    """Returns the rows `at` of a contiguous matrix with WIDTH columns, padded with zeros to DEPTH columns."""
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
    """Loads the rows `at` if one chunk holds all of D. Otherwise returns a placeholder that is not read."""
    if WIDTH <= DEPTH:
        resident = load_rows(x_ptr, at, WIDTH, DEPTH, UPCAST)
    else:
        resident = at
    return resident


@triton.jit
def similarities(
    resident, x_ptr, x_at, y_ptr, y_at, WIDTH: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr
):
    """Returns the float32 tile x[x_at] @ y[y_at]^T. `resident` comes from `resident_rows` of x and x_at."""
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
    """Returns the column of each row's positive, or -1, which is in no tile, if row >= n."""
    return tl.where(row < n, row + offset, -1)


@triton.jit
def within(target, first, COLUMNS: tl.constexpr):
    """Returns, for each row, whether its column `target` lies in the tile that begins at column `first`."""
    return (target >= first) & (target < first + COLUMNS)


@triton.jit
def crosses(first_row, first, offset, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns whether the tile that begins at (first_row, first) can hold pairs (i, i + offset)."""
    return (first_row + offset < first + COLUMNS) & (first_row + ROWS + offset > first)


@triton.jit
def different(row_ids, column_ids, row, column, n, m):
    """Returns a boolean tile: true for pairs inside the n x m matrix whose two image ids differ."""
    return (row < n)[:, None] & (column < m)[None, :] & (row_ids[:, None] != column_ids[None, :])


@triton.jit
def selected(tile, positive):
    """Returns, for each row of `tile`, its entry where the mask `positive` is true, or 0 without one."""
    return tl.sum(tl.where(positive, tile, 0.0), 1)


@triton.jit
def negatives(
    resident, image, text, text_ids, positive, sign, row, inner_row, row_id, target, first_row, first, n, m, offset,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Returns the column indices of the tile that begins at (first_row, first), and sign * S of the tile.

    In sign * S, all entries that are not negatives are set to -inf. The function also writes sign * S of the
    tile's positives to the array `positive`, of shape (B,). `resident`, `row`, `inner_row`, `row_id` and
    `target` describe the rows of the tile.
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
    """Returns the positive similarity of each row and each column of a tile. Reads tile `s` if SINGLE."""
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
    """Returns (sign, factor) so that exp(scale * s) = 2^(factor * sign * s). factor > 0, so it keeps -inf."""
    scale = tl.load(scale_ptr).to(tl.float32)
    sign = tl.where(scale < 0, -1.0, 1.0)
    # By default, a maximum on a GPU ignores NaN. Then the loss would hide a scale that is NaN.
    return sign, tl.maximum(tl.abs(scale) * 1.4426950408889634, 1e-30, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def reference_of(top, factor):
    """Returns the largest exponent, factor * top, to be subtracted from all. Returns 0 if top = -inf."""
    return tl.where(top == float("-inf"), 0.0, top) * factor


@triton.jit
def log1p_of(e):
    """Returns log(1 + e) = 2 artanh(e / (2 + e)), as a series, exact to a few ulp for 0 <= e <= 1."""
    t = e / (2.0 + e)
    q = t * t
    return (
        2.0 * t * (1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13)))))))
    )


@triton.jit
def softplus_and_sigmoid(z):
    """Returns log(1 + exp(z)) and 1 / (1 + exp(-z)), both exact to a few ulp for every z."""
    e = tl.exp(-tl.abs(z))
    weight = 1.0 / (1.0 + e)
    return tl.maximum(z, 0.0) + log1p_of(e), tl.where(z >= 0, weight, e * weight)


@triton.jit
def softplus_and_sigmoid_2(z):
    """Returns log2(1 + 2^z) and 1 / (1 + 2^-z), both exact to a few ulp for every z."""
    e = tl.exp2(-tl.abs(z))
    weight = 1.0 / (1.0 + e)
    return tl.maximum(z, 0.0) + 1.4426950408889634 * log1p_of(e), tl.where(z >= 0, weight, e * weight)
