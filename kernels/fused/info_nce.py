"""Symmetric InfoNCE with a learnable scale: 8 n M D flops, no matrix kept.

Forward (2 n M D): `_sweep` makes every tile of S once. A program owns a block of rows and a range of columns, with
the rows' (largest, sum of exponentials) online in registers; per tile it writes each column's. `_merge` adds these
up in ascending order. Strips of STRIP rows keep the columns' parts at 8 * STRIP / rows bytes a column.
The backward (6 n M D) is in `info_nce_gradient.py`.

Exponents are taken to base 2 as one fused multiply-add, factor * S - reference, which rounds once: the largest
similarity, not the largest exponent, is what is kept. Positives stay out of all sums. What is handed to the backward
of each row and column are the log2-odds of the others against its positive: the loss is their softplus, 1 - P of the
positive their sigmoid, and both keep all their digits where a model is sure of itself, which 1 - P would not. For
the same reason exponents and d_scale go by differences to the positive's similarity, which `positives.py` repeats.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2s.kernels.fused.launch import INTERPRETED, MERGED, Strips, on, options, total, untiled
from d2s.kernels.fused.spec import KernelSpec
from d2s.kernels.fused.sweep import (
    crosses,
    different,
    exponent_of,
    kept_rows,
    picked,
    positive_column,
    reference_of,
    similarities,
    softplus_and_sigmoid_2,
    within,
)
from d2s.kernels.fused.tiles import Tile, tile_for

LN2 = 0.6931471805599453
SWEEP_SIZES = ("n", "m", "offset", "start", "tiles", "strip")
MERGE_SIZES = ("n", "m", "start", "stop", "strip", "splits", "blocks", "first_loss")


@triton.jit(do_not_specialize=SWEEP_SIZES)
def _sweep(
    image,
    text,
    image_ids,
    text_ids,
    scale,
    positive,
    row_top,
    row_sum,
    column_top,
    column_sum,
    n,
    m,
    offset,
    start,
    tiles,
    strip,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BOTH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Rows start + ROWS * program 0, against `tiles` tiles of columns from program 1 times as many on."""
    block, split = tl.program_id(0), tl.program_id(1)
    first_row = start + block * ROWS
    row = first_row + tl.arange(0, ROWS)
    inner_row = tl.minimum(row, n - 1)
    target = positive_column(row, n, offset)
    row_id = tl.load(image_ids + inner_row)
    sign, factor = exponent_of(scale)
    kept = kept_rows(image, inner_row, WIDTH, DEPTH, UPCAST)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    sums = tl.zeros((ROWS,), tl.float32)
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(m, COLUMNS))):
        first = tile * COLUMNS
        column = first + tl.arange(0, COLUMNS)
        inner_column = tl.minimum(column, m - 1)
        s = sign * similarities(kept, image, inner_row, text, inner_column, WIDTH, DEPTH, UPCAST)
        if crosses(first_row, first, offset, ROWS, COLUMNS):
            is_positive = target[:, None] == column[None, :]
            tl.store(positive + row, picked(s, is_positive), mask=within(target, first, COLUMNS))
            s = tl.where(is_positive, float("-inf"), s)
        column_id = tl.load(text_ids + inner_column)
        s = tl.where(different(row_id, column_id, row, column, n, m), s, float("-inf"))
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
def _added(best, sums, tops, parts, inside, count, stride, factor):
    """(largest, sum of exponentials) after `count` more such parts, one every `stride` entries."""
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
    """(log2 of the others' sum over the positive's exponential, cost); -inf where there are no others."""
    reference = reference_of(best, factor)
    logarithm = tl.where(sums == 0, float("-inf"), tl.log2(tl.where(sums == 0, 1.0, sums)))
    odds = logarithm - tl.fma(own, factor, -reference)
    cost, _ = softplus_and_sigmoid_2(odds)
    return odds, tl.where(inside, 0.5 * LN2 * cost, 0.0)


@triton.jit(do_not_specialize=MERGE_SIZES)
def _merge(
    scale,
    positive,
    row_top,
    row_sum,
    column_top,
    column_sum,
    row_odds,
    state_top,
    column_odds,
    loss,
    n,
    m,
    start,
    stop,
    strip,
    splits,
    blocks,
    first_loss,
    BOTH: tl.constexpr,
    MERGED: tl.constexpr,
    LN2: tl.constexpr,
):
    """MERGED rows of the strip start..stop and as many columns; column_odds holds sums until the last strip."""
    program = tl.program_id(0)
    _, factor = exponent_of(scale)
    lane = program * MERGED + tl.arange(0, MERGED)
    row = start + lane
    inside = row < stop
    best, sums = tl.full((MERGED,), float("-inf"), tl.float32), tl.zeros((MERGED,), tl.float32)
    best, sums = _added(best, sums, row_top + lane, row_sum + lane, inside, splits, strip, factor)
    own = tl.load(positive + row, mask=inside, other=0.0)
    odds, cost = _finished(best, sums, own, factor, inside, LN2)
    tl.store(row_odds + row, odds, mask=inside)
    value = tl.sum(cost, 0)
    if BOTH:
        inside = lane < m
        seen = inside & (start > 0)
        best = tl.load(state_top + lane, mask=seen, other=float("-inf"))
        sums = tl.load(column_odds + lane, mask=seen, other=0.0)
        best, sums = _added(best, sums, column_top + lane, column_sum + lane, inside, blocks, m, factor)
        if stop == n:
            own = tl.load(positive + lane, mask=inside, other=0.0)
            sums, cost = _finished(best, sums, own, factor, inside, LN2)
            value += tl.sum(cost, 0)
        tl.store(state_top + lane, best, mask=inside)
        tl.store(column_odds + lane, sums, mask=inside)
    tl.store(loss + first_loss + program, value)


def info_nce_forward(
    image: Tensor, text: Tensor, image_ids: Tensor, text_ids: Tensor, scale: Tensor, offset: int, both: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss (), row_lse (n,), column_lse (M,)), float32; of the latter column_lse is empty without `both`.

    image (n, D), text (M, D), ids (n,) and (M,) int64, scale one entry. What the names call lse is counted from
    the positive's logit: log2 of (sum over the others) / (exponential of the positive), -inf without others.
    """
    image, text = image.contiguous(), text.contiguous()
    image_ids, text_ids = image_ids.contiguous(), text_ids.contiguous()
    scale = scale.to(torch.float32)
    (n, width), m = image.shape, text.shape[0]
    tile = tile_for("info_nce_sweep", image)
    strips, merged_columns = Strips(n, m, tile, both), m if both else 0
    floats = {"dtype": torch.float32, "device": image.device}
    positive, state, row_lse, column_lse, losses = (
        torch.empty(k, **floats) for k in (n, merged_columns, n, merged_columns, strips.losses)
    )
    # Each by itself: halves of one would be aligned with some sizes and not with others, a build for each.
    rows, columns = (
        (torch.empty(k, **floats), torch.empty(k, **floats)) for k in (strips.row_parts, strips.column_parts)
    )
    with on(image):
        for start, stop, blocks, first_loss in strips:
            _sweep[blocks, strips.splits](
                image, text, image_ids, text_ids, scale, positive, *rows, *columns, n, m, offset, start,
                strips.tiles, strips.rows, WIDTH=width, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
                BOTH=both, UPCAST=INTERPRETED, **options(tile),
            )  # fmt: skip
            _merge[(strips.merging,)](
                scale, positive, *rows, *columns, row_lse, state, column_lse, losses, n, m, start, stop,
                strips.rows, strips.splits, blocks, first_loss, BOTH=both, MERGED=MERGED, LN2=LN2,
            )  # fmt: skip
    return total(losses), row_lse, column_lse


def _sweep_constants(tile: Tile, width: int, half: bool) -> dict[str, object]:
    sizes = {"WIDTH": width, "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
    return {**sizes, "BOTH": True, "UPCAST": False}


_INPUTS = {**dict.fromkeys(("image", "text"), "*x"), **dict.fromkeys(("image_ids", "text_ids"), "*i64")}
_SWEPT = ("scale", "positive", "row_top", "row_sum", "column_top", "column_sum")
_MERGED = ("row_odds", "state_top", "column_odds", "loss")
SPECS = [
    KernelSpec(
        name="info_nce_sweep",
        kernel=_sweep,
        pointers={
            **_INPUTS,
            **dict.fromkeys(("scale", "positive", "row_top", "row_sum", "column_top", "column_sum"), "*fp32"),
        },
        scalars=dict.fromkeys(SWEEP_SIZES, "i32"),
        constants=_sweep_constants,
        unaligned=frozenset({"scale", *SWEEP_SIZES}),
    ),
    KernelSpec(
        name="info_nce_merge",
        kernel=_merge,
        pointers=dict.fromkeys((*_MERGED, *_SWEPT), "*fp32"),
        scalars=dict.fromkeys(MERGE_SIZES, "i32"),
        constants=lambda tile, width, half: {"BOTH": True, "MERGED": MERGED, "LN2": LN2},
        unaligned=frozenset({"scale", *MERGE_SIZES}),
        dots=False,
        options=untiled,
        dtypes=("fp32",),
        widths=(64,),
    ),
]
