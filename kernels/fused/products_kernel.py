"""The kernel behind `products.py`: a block's share of d_image = dS @ text and d_text = dS^T @ image in one launch."""

import triton
import triton.language as tl

from d2s.kernels.fused.spec import KernelSpec
from d2s.kernels.fused.tiles import Tile

SIZES = (
    *("stride", "row_start", "rows", "column_start", "columns", "n", "m", "offset", "row_programs"),
    *("list_length", "first_column", "last_column", "first_row", "last_row"),
)


@triton.jit
def _sum(
    ds,
    stride,
    at,
    y_ptr,
    y_first,
    y_last,
    d,
    steps,
    tiles,
    SPAN: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SKIP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Entries (at, d) of dS @ y, or of dS^T @ y: (ROWS, COLUMNS) float32, over `steps` chunks of DEPTH.

    SKIP: `tiles` lists which spans of SPAN entries hold anything at all, and only those are read.
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
    value,
    sums,
    out,
    at,
    size,
    d,
    other,
    partner,
    others,
    pull,
    row,
    factor,
    first,
    last,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    UNSCALE: tl.constexpr,
    PULL: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """Adds value (ROWS, COLUMNS) to what earlier blocks left in sums; the last block's result goes to out.

    Its rows are `at`, .. of size in sums and out; their partners are partner, .. of others in other, and have
    pull[row], ..: all of them scalars, so that offsets within the tile fit into 32 bits.
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


@triton.jit(do_not_specialize=SIZES[1:])
def products_kernel(
    ds,
    image,
    text,
    pull,
    factor,
    image_sum,
    text_sum,
    d_image,
    d_text,
    row_tiles,
    row_count,
    column_tiles,
    column_count,
    stride,
    row_start,
    rows,
    column_start,
    columns,
    n,
    m,
    offset,
    row_programs,
    list_length,
    first_column,
    last_column,
    first_row,
    last_row,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    ROW_SPAN: tl.constexpr,
    COLUMN_SPAN: tl.constexpr,
    UNSCALE: tl.constexpr,
    PULL: tl.constexpr,
    FACTOR: tl.constexpr,
    SKIP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One block's share: the first row_programs own rows of d_image, the others rows of d_text; COLUMNS channels."""
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
        **dict.fromkeys(("ds", "image", "text"), "*x"),
        **dict.fromkeys(("pull", "factor", "image_sum", "text_sum"), "*fp32"),
        # The hinge wants its gradients in float32.
        **dict.fromkeys(("d_image", "d_text"), "*fp32" if skip else "*x"),
        **dict.fromkeys(("row_tiles", "row_count", "column_tiles", "column_count"), "*i32"),
    }

    def constants(tile: Tile, width: int, half: bool) -> dict[str, object]:
        sizes = {"WIDTH": width, "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
        flags = {"PULL": not skip, "FACTOR": not skip, "SKIP": skip, "UPCAST": False, "UNSCALE": 1.0}
        return {**sizes, **flags, "ROW_SPAN": tile.rows, "COLUMN_SPAN": tile.rows}

    return KernelSpec(
        name="products_listed" if skip else "products",
        row="products",
        kernel=products_kernel,
        pointers=pointers,
        scalars=dict.fromkeys(SIZES, "i32"),
        constants=constants,
        unaligned=frozenset({"factor", *SIZES[1:]}),
    )


SPECS = [_spec(False), _spec(True)]
