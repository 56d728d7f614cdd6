"""Computes the hinge loss with the hardest negative ("winner") of each row and column.

loss = sum over rows of [margin + max over negatives S_ij - S_positive]+, and the same over columns.

`_sweep` computes every tile of S once (2 B N D flops). A program takes a tile of rows (a "block") and a range
of columns (a "split"). It keeps the largest negative of each row, and its column, in registers. For each tile
it writes the largest negative of each column, and its row. `_merge` reads these partial results in ascending
order. Only a larger value replaces another, so ties go to the lowest index. The rows are processed in strips
of STRIP rows. So the partial results take 8 * STRIP / ROWS bytes per column, for any B. The backward is in
`hinge_gather.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2s.kernels.fused.launch import (
    INTERPRETED,
    MERGE,
    MERGED,
    Strips,
    on_device_of,
    options,
    tile_constants,
    total,
)
from d2s.kernels.fused.spec import KernelSpec
from d2s.kernels.fused.sweep import negatives, positive_column, resident_rows
from d2s.kernels.fused.tiles import tile_for
from d2s.kernels.sides import Sides


@triton.jit(do_not_specialize=("n", "m", "offset", "start", "tiles", "strip"))
def _sweep(
    image,  # (B, D)
    text,  # (N, D)
    image_ids,  # (B,)
    text_ids,  # (N,)
    positive,  # (B,), similarity of each row with its positive
    row_best,  # (splits, strip)
    row_at,  # (splits, strip)
    column_best,  # (blocks, N)
    column_at,  # (blocks, N)
    n, m, offset, start, tiles, strip,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BOTH: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Finds the maxima of ROWS rows over `tiles` tiles of columns. The strip begins at row `start`."""
    block, split = tl.program_id(0), tl.program_id(1)
    first_row = start + block * ROWS
    row = first_row + tl.arange(0, ROWS)
    inner_row = tl.minimum(row, n - 1)
    target = positive_column(row, n, offset)
    row_id = tl.load(image_ids + inner_row)
    resident = resident_rows(image, inner_row, WIDTH, DEPTH, UPCAST)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    at = tl.zeros((ROWS,), tl.int32)
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(m, COLUMNS))):
        column, s = negatives(
            resident, image, text, text_ids, positive, 1.0, row, inner_row, row_id, target, first_row,
            tile * COLUMNS, n, m, offset, WIDTH, ROWS, COLUMNS, DEPTH, UPCAST,
        )  # fmt: skip
        top = tl.max(s, 1)
        lowest = tl.min(tl.where(s == top[:, None], column[None, :], 2147483647), 1)
        at = tl.where(top > best, lowest, at)
        best = tl.maximum(best, top)
        if BOTH:
            top = tl.max(s, 0)
            lowest = tl.min(tl.where(s == top[None, :], row[:, None], 2147483647), 0)
            part = block.to(tl.int64) * m + column
            tl.store(column_best + part, top, mask=column < m)
            tl.store(column_at + part, lowest, mask=column < m)
    part = split.to(tl.int64) * strip + row - start
    tl.store(row_best + part, best, mask=row < n)
    tl.store(row_at + part, at, mask=row < n)


@triton.jit
def _first_largest(best, at, values, places, inside, parts, stride):
    """Merges the maxima (best, at) with `parts` more, `stride` entries apart. The first of equals is kept."""
    for _ in range(parts):
        value = tl.load(values, mask=inside, other=float("-inf"))
        place = tl.load(places, mask=inside, other=0)
        at = tl.where(value > best, place, at)
        best = tl.maximum(best, value)
        values += stride
        places += stride
    return best, at


@triton.jit
def _cost(margin, best, positive, inside):
    """Returns [margin + best - positive]+, or 0 without a negative. NaN stays NaN, so the loss is NaN."""
    cost = margin + best - positive
    # On a GPU, a maximum ignores NaN. So a row of NaN is recognised by its positive.
    shown = (best != float("-inf")) | (positive != positive)
    return tl.where(inside & shown & ~(cost <= 0), cost, 0.0)


@triton.jit(do_not_specialize=("n", "m", "start", "stop", "strip", "splits", "blocks", "first_loss"))
def _merge(
    positive,  # (B,)
    row_best,  # (splits, strip)
    row_parts,  # (splits, strip)
    column_best,  # (blocks, N)
    column_parts,  # (blocks, N)
    row_at,  # (B,)
    row_active,  # (B,)
    state_best,  # (N,), the largest of each column so far
    column_at,  # (N,)
    column_active,  # (N,)
    loss,  # (strips * merging,)
    margin, n, m, start, stop, strip, splits, blocks, first_loss,
    BOTH: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """Merges partial maxima of MERGED rows and MERGED columns. Columns are complete after the last strip."""
    program = tl.program_id(0)
    lane = program * MERGED + tl.arange(0, MERGED)
    row = start + lane
    inside = row < stop
    best = tl.full((MERGED,), float("-inf"), tl.float32)
    at = tl.zeros((MERGED,), tl.int32)
    best, at = _first_largest(best, at, row_best + lane, row_parts + lane, inside, splits, strip)
    cost = _cost(margin, best, tl.load(positive + row, mask=inside, other=0.0), inside)
    tl.store(row_at + row, tl.minimum(at, m - 1).to(tl.int64), mask=inside)
    tl.store(row_active + row, cost > 0, mask=inside)
    value = tl.sum(cost, 0)
    if BOTH:
        inside = lane < m
        seen = inside & (start > 0)
        best = tl.load(state_best + lane, mask=seen, other=float("-inf"))
        at = tl.load(column_at + lane, mask=seen, other=0).to(tl.int32)
        best, at = _first_largest(best, at, column_best + lane, column_parts + lane, inside, blocks, m)
        tl.store(state_best + lane, best, mask=inside)
        tl.store(column_at + lane, tl.minimum(at, n - 1).to(tl.int64), mask=inside)
        if stop == n:
            cost = _cost(margin, best, tl.load(positive + lane, mask=inside, other=0.0), inside)
            tl.store(column_active + lane, cost > 0, mask=inside)
            value += tl.sum(cost, 0)
    tl.store(loss + first_loss + program, value)


def hinge_max_forward(sides: Sides, margin: float) -> tuple[Tensor, ...]:
    """Returns the loss (float32), then the fields of `Winners`. See `d2s.kernels.functional.hinge_loss`."""
    image, text, image_ids, text_ids, offset, both = sides.contiguous()
    (n, width), m = image.shape, text.shape[0]
    tile = tile_for("hinge_max_sweep", image)
    strips, merged_columns = Strips(n, m, tile, both), m if both else 0
    floats, ints = ({"dtype": t, "device": image.device} for t in (torch.float32, torch.int32))
    positive, state = torch.empty(n, **floats), torch.empty(merged_columns, **floats)
    rows = torch.empty(strips.row_parts, **floats), torch.empty(strips.row_parts, **ints)
    columns = torch.empty(strips.column_parts, **floats), torch.empty(strips.column_parts, **ints)
    losses = torch.empty(strips.losses, **floats)
    row_at, column_at = image_ids.new_empty(n), image_ids.new_empty(merged_columns)
    row_active, column_active = (torch.empty_like(x, dtype=torch.bool) for x in (row_at, column_at))
    with on_device_of(image):
        for start, stop, blocks, first_loss in strips:
            _sweep[blocks, strips.splits](
                image, text, image_ids, text_ids, positive, *rows, *columns, n, m, offset, start, strips.tiles,
                strips.rows, BOTH=both, **tile_constants(tile, width, INTERPRETED), **options(tile),
            )  # fmt: skip
            _merge[(strips.merging,)](
                positive, *rows, *columns, row_at, row_active, state, column_at, column_active, losses, margin,
                n, m, start, stop, strips.rows, strips.splits, blocks, first_loss, BOTH=both, MERGED=MERGED,
            )  # fmt: skip
    return total(losses), row_at, row_active, column_at, column_active


SPECS = [
    KernelSpec(
        name="hinge_max_sweep",
        kernel=_sweep,
        pointers={
            **dict.fromkeys(("positive", "row_best", "column_best"), "*fp32"),
            **dict.fromkeys(("row_at", "column_at"), "*i32"),
        },
        constants=lambda tile, width, half: {**tile_constants(tile, width), "BOTH": True},
    ),
    KernelSpec(
        name="hinge_max_merge",
        kernel=_merge,
        pointers={
            **dict.fromkeys(("positive", "row_best", "column_best", "state_best", "loss"), "*fp32"),
            **dict.fromkeys(("row_parts", "column_parts"), "*i32"),
            **dict.fromkeys(("row_at", "column_at"), "*i64"),
            **dict.fromkeys(("row_active", "column_active"), "*i1"),
        },
        scalars={"margin": "fp32"},
        constants=lambda tile, width, half: {"BOTH": True, "MERGED": MERGED},
        **MERGE,
    ),
]
