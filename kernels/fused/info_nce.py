"""Symmetric InfoNCE with a learnable scale: 8 B N D flops, and the similarity matrix is never stored.

loss = 0.5 * sum over rows of log(1 + sum over negatives exp(scale * (S_ij - S_positive))), and the same over columns.

Forward (2 B N D): `_sweep` makes every tile of S once. A program has a tile of rows and a range of columns, with the
rows' (largest, sum of exponentials) in registers; per tile it writes each column's. `_merge` adds these up in
ascending order. Strips of STRIP rows keep the columns' partial results at 8 * STRIP / ROWS bytes a column.
The backward (6 B N D) is in `info_nce_gradient.py`.

Exponents are in base 2 and one fused multiply-add, factor * S - reference, which rounds once; therefore the largest
similarity is stored and not the largest exponent. Positives stay out of all sums. The backward gets the odds of each
row and column: log2 of (sum over the negatives / exponential of the positive). The cost is their softplus and
1 - P(positive) their sigmoid. Both keep all their digits when a model is certain; 1 - P computed from P would not.
For the same reason exponents and d_scale are computed from differences to the positive's similarity, which
`positives.py` makes again for the backward.
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
    positive,  # (B,), sign * similarity of each row's positive
    row_top,  # (splits, strip)
    row_sum,  # (splits, strip)
    column_top,  # (blocks, N)
    column_sum,  # (blocks, N)
    n, m, offset, start, tiles, strip,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BOTH: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """The tile of rows `program 0` of the strip from `start` on, against the `tiles` tiles of range `program 1`."""
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
    """(largest, sum of exponentials) merged with `count` more such pairs, one every `stride` entries."""
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
    """(odds, cost) of rows with the largest negative `best`, sum of exponentials `sums` and the positive `own`."""
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
    state_top,  # (N,), the columns' largest so far
    column_odds,  # (N,), sums until the last strip
    loss,  # (strips * merging,)
    n, m, start, stop, strip, splits, blocks, first_loss,
    BOTH: tl.constexpr, MERGED: tl.constexpr, LN2: tl.constexpr,
):  # fmt: skip
    """MERGED rows of the strip start..stop and as many columns, whose odds are final after the last strip."""
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
    """(loss (), row_odds (B,), column_odds (N,) or empty without both), float32.

    scale: one entry. Odds: log2 of (sum over the negatives / exponential of the positive), -inf without negatives.
    """
    image, text, image_ids, text_ids, offset, both = sides.contiguous()
    scale = scale.to(torch.float32)
    (n, width), m = image.shape, text.shape[0]
    tile = tile_for("info_nce_sweep", image)
    strips, merged_columns = Strips(n, m, tile, both), m if both else 0
    floats = {"dtype": torch.float32, "device": image.device}
    positive, state, row_odds, column_odds, losses = (
        torch.empty(k, **floats) for k in (n, merged_columns, n, merged_columns, strips.losses)
    )
    # Separate tensors: halves of one would be aligned for some sizes only, and Triton would compile both variants.
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
