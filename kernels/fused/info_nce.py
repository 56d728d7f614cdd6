"""Computes symmetric InfoNCE with a learnable scale, in 8 B N D flops. Does not store the similarity matrix.

loss = 0.5 * sum over rows, and over columns, of log(1 + sum over negatives exp(scale * (S_ij - S_positive))).

In the forward (2 B N D flops), `_sweep` computes every tile of S once. A program takes a tile of rows (a
"block") and a range of columns (a "split"). It keeps (largest, sum of exponentials) of each row in registers.
For each tile, it writes both numbers for each column. `_merge` adds up these partial results in ascending
order. The rows are processed in strips of STRIP rows, so partial results take 8 * STRIP / ROWS bytes per
column. `info_nce_gradient.py` has the backward (6 B N D flops).

Exponents are in base 2. Each exponent is one fused multiply-add, factor * S - reference, which rounds once.
So the kernels store the largest similarity, not the largest exponent. Positives stay out of all sums. For
each row and column, the forward saves the odds: log2 of (sum over the negatives / exponential of the
positive). The cost is the softplus of the odds, and 1 - P(positive) is their sigmoid. If a model is certain,
both keep all digits, unlike 1 - P computed from P. For the same reason, the backward computes exponents and
d_scale from differences to the positive's similarity. `positives.py` computes this similarity again.
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
from d2s.kernels.fused.sweep import (
    exponent_of,
    negatives,
    positive_column,
    reference_of,
    resident_rows,
    softplus_and_sigmoid_2,
)
from d2s.kernels.fused.tiles import tile_for
from d2s.kernels.sides import Sides

LN2 = 0.6931471805599453


@triton.jit(do_not_specialize=("n", "m", "offset", "start", "tiles", "strip"))
def _sweep(
    image,  # (B, D)
    text,  # (N, D)
    image_ids,  # (B,)
    text_ids,  # (N,)
    scale,  # (1,)
    positive,  # (B,), sign * similarity of each row with its positive
    row_top,  # (splits, strip)
    row_sum,  # (splits, strip)
    column_top,  # (blocks, N)
    column_sum,  # (blocks, N)
    n, m, offset, start, tiles, strip,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BOTH: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Computes, for ROWS rows from `start` on and for all columns, the largest S and the sum of exponentials."""
    block, split = tl.program_id(0), tl.program_id(1)
    first_row = start + block * ROWS
    row = first_row + tl.arange(0, ROWS)
    inner_row = tl.minimum(row, n - 1)
    target = positive_column(row, n, offset)
    row_id = tl.load(image_ids + inner_row)
    sign, factor = exponent_of(scale)
    resident = resident_rows(image, inner_row, WIDTH, DEPTH, UPCAST)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    sums = tl.zeros((ROWS,), tl.float32)
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(m, COLUMNS))):
        column, s = negatives(
            resident, image, text, text_ids, positive, sign, row, inner_row, row_id, target, first_row,
            tile * COLUMNS, n, m, offset, WIDTH, ROWS, COLUMNS, DEPTH, UPCAST,
        )  # fmt: skip
        top = tl.maximum(best, tl.max(s, 1))
        reference = reference_of(top, factor)
        sums *= tl.exp2(tl.fma(best, factor, -reference))
        sums += tl.sum(tl.exp2(tl.fma(s, factor, -reference[:, None])), 1)
        best = top
        if BOTH:
            top = tl.max(s, 0)
            reference = reference_of(top, factor)
            part = block.to(tl.int64) * m + column
            tl.store(column_top + part, top, mask=column < m)
            value = tl.sum(tl.exp2(tl.fma(s, factor, -reference[None, :])), 0)
            tl.store(column_sum + part, value, mask=column < m)
    part = split.to(tl.int64) * strip + row - start
    tl.store(row_top + part, best, mask=row < n)
    tl.store(row_sum + part, sums, mask=row < n)


@triton.jit
def _merged(best, sums, tops, parts, inside, count, stride, factor):
    """Merges (best, sums) with `count` more pairs (largest, sum of exponentials), `stride` entries apart."""
    for _ in range(count):
        other = tl.load(tops, mask=inside, other=float("-inf"))
        top = tl.maximum(best, other)
        reference = reference_of(top, factor)
        sums *= tl.exp2(tl.fma(best, factor, -reference))
        sums += tl.load(parts, mask=inside, other=0.0) * tl.exp2(tl.fma(other, factor, -reference))
        best = top
        tops += stride
        parts += stride
    return best, sums


@triton.jit
def _finished(best, sums, own, factor, inside, LN2: tl.constexpr):
    """Returns (odds, cost). `best`: largest negative. `sums`: sum of exponentials. `own`: the positive."""
    reference = reference_of(best, factor)
    logarithm = tl.where(sums == 0, float("-inf"), tl.log2(tl.where(sums == 0, 1.0, sums)))
    odds = logarithm - tl.fma(own, factor, -reference)
    cost, _ = softplus_and_sigmoid_2(odds)
    return odds, tl.where(inside, 0.5 * LN2 * cost, 0.0)


@triton.jit(do_not_specialize=("n", "m", "start", "stop", "strip", "splits", "blocks", "first_loss"))
def _merge(
    scale,  # (1,)
    positive,  # (B,)
    row_top,  # (splits, strip)
    row_sum,  # (splits, strip)
    column_top,  # (blocks, N)
    column_sum,  # (blocks, N)
    row_odds,  # (B,)
    state_top,  # (N,), the largest of each column so far
    column_odds,  # (N,), sums of exponentials until the last strip
    loss,  # (strips * merging,)
    n, m, start, stop, strip, splits, blocks, first_loss,
    BOTH: tl.constexpr, MERGED: tl.constexpr, LN2: tl.constexpr,
):  # fmt: skip
    """Merges partial results of MERGED rows and columns. Columns are complete after the last strip."""
    program = tl.program_id(0)
    _, factor = exponent_of(scale)
    lane = program * MERGED + tl.arange(0, MERGED)
    row = start + lane
    inside = row < stop
    best, sums = tl.full((MERGED,), float("-inf"), tl.float32), tl.zeros((MERGED,), tl.float32)
    best, sums = _merged(best, sums, row_top + lane, row_sum + lane, inside, splits, strip, factor)
    own = tl.load(positive + row, mask=inside, other=0.0)
    odds, cost = _finished(best, sums, own, factor, inside, LN2)
    tl.store(row_odds + row, odds, mask=inside)
    value = tl.sum(cost, 0)
    if BOTH:
        inside = lane < m
        seen = inside & (start > 0)
        best = tl.load(state_top + lane, mask=seen, other=float("-inf"))
        sums = tl.load(column_odds + lane, mask=seen, other=0.0)
        best, sums = _merged(best, sums, column_top + lane, column_sum + lane, inside, blocks, m, factor)
        if stop == n:
            own = tl.load(positive + lane, mask=inside, other=0.0)
            sums, cost = _finished(best, sums, own, factor, inside, LN2)
            value += tl.sum(cost, 0)
        tl.store(state_top + lane, best, mask=inside)
        tl.store(column_odds + lane, sums, mask=inside)
    tl.store(loss + first_loss + program, value)


def info_nce_forward(sides: Sides, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the float32 loss and odds of rows and columns. Without `both`, the columns' odds are empty."""
    image, text, image_ids, text_ids, offset, both = sides.contiguous()
    scale = scale.to(torch.float32)
    (n, width), m = image.shape, text.shape[0]
    tile = tile_for("info_nce_sweep", image)
    strips, merged_columns = Strips(n, m, tile, both), m if both else 0
    floats = {"dtype": torch.float32, "device": image.device}
    positive, state, row_odds, column_odds, losses = (
        torch.empty(k, **floats) for k in (n, merged_columns, n, merged_columns, strips.losses)
    )
    # Allocate separate tensors. Halves of one tensor would be aligned for some sizes only, and Triton would
    # compile two variants.
    rows, columns = (
        (torch.empty(k, **floats), torch.empty(k, **floats)) for k in (strips.row_parts, strips.column_parts)
    )
    with on_device_of(image):
        for start, stop, blocks, first_loss in strips:
            _sweep[blocks, strips.splits](
                image, text, image_ids, text_ids, scale, positive, *rows, *columns, n, m, offset, start,
                strips.tiles, strips.rows, BOTH=both, **tile_constants(tile, width, INTERPRETED), **options(tile),
            )  # fmt: skip
            _merge[(strips.merging,)](
                scale, positive, *rows, *columns, row_odds, state, column_odds, losses, n, m, start, stop,
                strips.rows, strips.splits, blocks, first_loss, BOTH=both, MERGED=MERGED, LN2=LN2,
            )  # fmt: skip
    return total(losses), row_odds, column_odds


_SWEPT = ("scale", "positive", "row_top", "row_sum", "column_top", "column_sum")
_MERGED = ("row_odds", "state_top", "column_odds", "loss")
SPECS = [
    KernelSpec(
        name="info_nce_sweep",
        kernel=_sweep,
        pointers=dict.fromkeys(_SWEPT, "*fp32"),
        constants=lambda tile, width, half: {**tile_constants(tile, width), "BOTH": True},
        unaligned=frozenset({"scale"}),
    ),
    KernelSpec(
        name="info_nce_merge",
        kernel=_merge,
        pointers=dict.fromkeys((*_MERGED, *_SWEPT), "*fp32"),
        constants=lambda tile, width, half: {"BOTH": True, "MERGED": MERGED, "LN2": LN2},
        unaligned=frozenset({"scale"}),
        **MERGE,
    ),
]
