"""Implements the kernel of `products.py`, which adds one block to dS @ text and to dS^T @ image."""

import triton
import triton.language as tl

from d2s.kernels.fused.launch import tile_constants
from d2s.kernels.fused.spec import KernelSpec
from d2s.kernels.fused.tiles import Tile


@triton.jit
def _sum(
    ds, stride, at, y_ptr, y_first, y_last, d, steps, tiles,
    SPAN: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    TRANSPOSED: tl.constexpr, SKIP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Returns rows `at` and channels `d` of dS @ y (dS^T @ y if TRANSPOSED) as a float32 tile.

    `y` is y_ptr[y_first:]. The sum runs over `steps` chunks of DEPTH entries. If SKIP, it reads only the
    tiles in the list `tiles`, each of SPAN entries.
    """
    value = tl.zeros((ROWS, COLUMNS), tl.float32)
    k = tl.arange(0, DEPTH)
    channel = (d < WIDTH)[None, :]
    for step in range(0, steps):
        if SKIP:
            first = tl.load(tiles + step // (SPAN // DEPTH)) * SPAN + step % (SPAN // DEPTH) * DEPTH
        else:
            first = step * DEPTH
        if TRANSPOSED:
            x = tl.trans(tl.load(ds + (first + k)[:, None] * stride + at[None, :]))
        else:
            x = tl.load(ds + at[:, None] * stride + (first + k)[None, :])
        line = tl.minimum(y_first + first + k, y_last).to(tl.int64)
        pointers = y_ptr + line[:, None] * WIDTH + d[None, :]
        if WIDTH % COLUMNS == 0:
            y = tl.load(pointers)
        else:
            y = tl.load(pointers, mask=channel, other=0.0)
        if UPCAST:
            x = x.to(tl.float32)
            y = y.to(tl.float32)
        value = tl.dot(x, y, value, input_precision="ieee")
    return value


@triton.jit
def _finish(
    value, sums, out, at, size, d, other, partner, others, pull, row, factor, first, last,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, UNSCALE: tl.constexpr, PULL: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Adds the tile `value` to the sums of earlier blocks. If this block is the `last`, writes `out`.

    `sums` and `out` have shape (size, WIDTH). `value` belongs to their rows from `at` on. The positives of
    these rows begin at row `partner` of `other`, which has `others` rows. Their weights begin at pull[row].
    `at`, `partner` and `row` must be scalars, so that offsets within the tile fit into 32 bits.
    """
    lane = tl.arange(0, ROWS)
    here = lane[:, None] * WIDTH + d[None, :]
    inside = at + lane < size
    mask = inside[:, None] & (d < WIDTH)[None, :]
    begin = at.to(tl.int64) * WIDTH
    if first == 0:
        value += tl.load(sums + begin + here, mask=mask, other=0.0)
    if last == 0:
        tl.store(sums + begin + here, value, mask=mask)
    else:
        value *= UNSCALE
        if PULL:
            paired = inside & (partner + lane >= 0) & (partner + lane < others)
            weight = tl.load(pull + row + lane, mask=paired, other=0.0)
            mates = other + partner.to(tl.int64) * WIDTH + here
            mate = tl.load(mates, mask=paired[:, None] & (d < WIDTH)[None, :], other=0.0)
            value -= weight[:, None] * mate.to(tl.float32)
        if FACTOR:
            value *= tl.load(factor)
        tl.store(out + begin + here, value.to(out.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=(
        *("row_start", "rows", "column_start", "columns", "n", "m", "offset", "row_programs"),
        *("list_length", "first_column", "last_column", "first_row", "last_row"),
    )
)
def products_kernel(
    ds,  # (block rows, stride)
    image,  # (B, D)
    text,  # (N, D)
    pull,  # (B,)
    factor,  # (1,)
    image_sum,  # (block rows, D)
    text_sum,  # (block columns, D)
    d_image,  # (block rows, D)
    d_text,  # (block columns, D)
    row_tiles,  # (row tiles, list_length)
    row_count,  # (row tiles,)
    column_tiles,  # (column tiles, list_length)
    column_count,  # (column tiles,)
    stride, row_start, rows, column_start, columns, n, m, offset, row_programs, list_length, first_column,
    last_column, first_row, last_row,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    ROW_SPAN: tl.constexpr, COLUMN_SPAN: tl.constexpr, UNSCALE: tl.constexpr, PULL: tl.constexpr,
    FACTOR: tl.constexpr, SKIP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Computes ROWS x COLUMNS entries of d_image (in the first `row_programs` programs) or of d_text."""
    program = tl.program_id(0)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if program < row_programs:
        at = program * ROWS + tl.arange(0, ROWS)
        steps = tl.cdiv(columns, DEPTH)
        tiles = row_tiles
        if SKIP:
            span = program * ROWS // ROW_SPAN
            tiles += span * list_length
            steps = tl.load(row_count + span) * (COLUMN_SPAN // DEPTH)
        value = _sum(
            ds, stride, at, text, column_start, m - 1, d, steps, tiles,
            COLUMN_SPAN, WIDTH, ROWS, COLUMNS, DEPTH, False, SKIP, UPCAST,
        )  # fmt: skip
        row = row_start + program * ROWS
        _finish(
            value, image_sum, d_image, program * ROWS, rows, d, text, row + offset, m, pull, row, factor,
            first_column, last_column, WIDTH, ROWS, UNSCALE, PULL, FACTOR,
        )  # fmt: skip
    else:
        program -= row_programs
        at = program * ROWS + tl.arange(0, ROWS)
        steps = tl.cdiv(rows, DEPTH)
        tiles = column_tiles
        if SKIP:
            span = program * ROWS // COLUMN_SPAN
            tiles += span * list_length
            steps = tl.load(column_count + span) * (ROW_SPAN // DEPTH)
        value = _sum(
            ds, stride, at, image, row_start, n - 1, d, steps, tiles,
            ROW_SPAN, WIDTH, ROWS, COLUMNS, DEPTH, True, SKIP, UPCAST,
        )  # fmt: skip
        row = column_start + program * ROWS - offset
        _finish(
            value, text_sum, d_text, program * ROWS, columns, d, image, row, n, pull, row, factor,
            first_row, last_row, WIDTH, ROWS, UNSCALE, PULL, FACTOR,
        )  # fmt: skip


def _spec(skip: bool) -> KernelSpec:
    pointers = {
        **dict.fromkeys(("pull", "factor", "image_sum", "text_sum"), "*fp32"),
        # The hinge loss, which skips tiles, has float32 gradients.
        **dict.fromkeys(("d_image", "d_text"), "*fp32" if skip else "*x"),
        **dict.fromkeys(("row_tiles", "row_count", "column_tiles", "column_count"), "*i32"),
    }

    def constants(tile: Tile, width: int, half: bool) -> dict[str, object]:
        flags = {"PULL": not skip, "FACTOR": not skip, "SKIP": skip, "UNSCALE": 1.0}
        return {**tile_constants(tile, width), **flags, "ROW_SPAN": tile.rows, "COLUMN_SPAN": tile.rows}

    return KernelSpec(
        name="products_listed" if skip else "products",
        row="products",
        kernel=products_kernel,
        pointers=pointers,
        scalars={"stride": "i32"},
        constants=constants,
        unaligned=frozenset({"factor"}),
    )


SPECS = [_spec(False), _spec(True)]
