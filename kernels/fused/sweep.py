"""What the sweeps over S = image @ text^T share on the device.

One function makes every tile of S, so that all kernels of a loss see the same bits: D is taken in ascending
chunks of DEPTH into one float32 accumulator, in the type of the embeddings (float32 ones without shortening).
UPCAST is for the interpreter alone, whose products of 16-bit floats are wrong.
"""

import triton
import triton.language as tl


@triton.jit
def whole_rows(x_ptr, at, WIDTH: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr):
    """Rows `at` (r,) of x (any, WIDTH), contiguous: (r, DEPTH) with zeros behind WIDTH <= DEPTH."""
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
def kept_rows(x_ptr, at, WIDTH: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr):
    """What a sweep loads once: its rows where one chunk holds all of D, else nothing."""
    if WIDTH <= DEPTH:
        kept = whole_rows(x_ptr, at, WIDTH, DEPTH, UPCAST)
    else:
        kept = at
    return kept


@triton.jit
def similarities(
    kept, x_ptr, x_at, y_ptr, y_at, WIDTH: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr
):
    """The tile x[x_at] @ y[y_at]^T, (r, c) float32; indices inside the matrices, kept as `kept_rows` gives it."""
    if WIDTH <= DEPTH:
        y = whole_rows(y_ptr, y_at, WIDTH, DEPTH, UPCAST)
        s = tl.dot(kept, tl.trans(y), input_precision="ieee")
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
    """The column of each row's positive; one that no tile has for rows behind the last."""
    return tl.where(row < n, row + offset, -1)


@triton.jit
def within(target, first, COLUMNS: tl.constexpr):
    """Which rows have their positive in the tile of COLUMNS columns from `first` on; (r,) bool."""
    return (target >= first) & (target < first + COLUMNS)


@triton.jit
def crosses(first_row, first, offset, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Whether the tile from (first_row, first) on can hold positives; most skip what concerns them."""
    return (first_row + offset < first + COLUMNS) & (first_row + ROWS + offset > first)


@triton.jit
def different(row_ids, column_ids, row, column, n, m):
    """Which pairs of a tile (r, c) lie inside the matrix and show two images."""
    return (row < n)[:, None] & (column < m)[None, :] & (row_ids[:, None] != column_ids[None, :])


@triton.jit
def picked(tile, positive):
    """The entry of each row of tile (r, c) where positive (r, c) is true, 0 where it has none."""
    return tl.sum(tl.where(positive, tile, 0.0), 1)


@triton.jit
def own_similarities(
    positive, s, is_positive, inner_row, inner_column, WHOLE: tl.constexpr, BOTH: tl.constexpr
):
    """What the positives of a tile's rows and columns have, (r,) and (c,): from positive (n,), or from the tile
    itself where it is the whole matrix. The second means nothing without BOTH."""
    if WHOLE:
        of_row, of_column = picked(s, is_positive), tl.sum(tl.where(is_positive, s, 0.0), 0)
    else:
        of_row = tl.load(positive + inner_row)
        of_column = of_row
        if BOTH:
            of_column = tl.load(positive + inner_column)
    return of_row, of_column


@triton.jit
def exponent_of(scale_ptr):
    """(sign, factor): exp(scale * s) = 2^(factor * (sign * s)), with a factor above 0 so that -inf stays -inf."""
    scale = tl.load(scale_ptr).to(tl.float32)
    sign = tl.where(scale < 0, -1.0, 1.0)
    # A device's maximum leaves out what is no number, and the loss would hide a scale that has become none.
    return sign, tl.maximum(tl.abs(scale) * 1.4426950408889634, 1e-30, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def reference_of(top, factor):
    """What to subtract from exponents whose largest is factor * top; 0 where there are none (top = -inf)."""
    return tl.where(top == float("-inf"), 0.0, top) * factor


@triton.jit
def log1p_of(e):
    """log(1 + e) for e in 0..1, good to a few ulp however small e is: 2 artanh(e / (2 + e)), as a series."""
    t = e / (2.0 + e)
    q = t * t
    return (
        2.0 * t * (1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13)))))))
    )


@triton.jit
def softplus_and_sigmoid(z):
    """(log(1 + exp(z)), 1 / (1 + exp(-z))), both good to a few ulp however small they are."""
    e = tl.exp(-tl.abs(z))
    weight = 1.0 / (1.0 + e)
    return tl.maximum(z, 0.0) + log1p_of(e), tl.where(z >= 0, weight, e * weight)


@triton.jit
def softplus_and_sigmoid_2(z):
    """(log2(1 + 2^z), 1 / (1 + 2^-z)), likewise."""
    e = tl.exp2(-tl.abs(z))
    weight = 1.0 / (1.0 + e)
    return tl.maximum(z, 0.0) + 1.4426950408889634 * log1p_of(e), tl.where(z >= 0, weight, e * weight)
