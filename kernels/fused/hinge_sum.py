"""The hinge with every violation: loss and gradient from one sweep, 6 n M D flops and nothing recomputed.

A pair's gradient dS is known as soon as its two positives are: 0, 1 or 2, exact in any type. `positives.py` makes
them first, by the sweep's own arithmetic, so that a negative equal to its positive violates a margin of 0 by
exactly nothing. `_pairs` then makes one block of dS (see `products.py`), parts of the loss, and per tile how many
pairs violate of every row and column. `hinge_lists.py` adds these counts up and lists the tiles in which anything
violates; the products read no others. Last the positives get their part, minus count times the partner.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2s.kernels.fused.hinge_lists import Counts
from d2s.kernels.fused.launch import INTERPRETED, on, options, total
from d2s.kernels.fused.positives import positives
from d2s.kernels.fused.products import Products
from d2s.kernels.fused.spec import KernelSpec
from d2s.kernels.fused.sweep import (
    crosses,
    different,
    kept_rows,
    own_similarities,
    positive_column,
    similarities,
)
from d2s.kernels.fused.tiles import Tile, tile_for

PAIRS_SIZES = ("n", "m", "offset", "row_start", "column_start", "first_loss")


@triton.jit
def _violation(s, threshold):
    """[s - threshold]+, keeping what is no number."""
    v = s - threshold
    return tl.where(v <= 0, 0.0, v)


@triton.jit(do_not_specialize=PAIRS_SIZES)
def _pairs(
    image,
    text,
    image_ids,
    text_ids,
    positive,
    ds,
    row_counts,
    column_counts,
    active,
    loss,
    margin,
    n,
    m,
    offset,
    row_start,
    column_start,
    first_loss,
    stride,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BOTH: tl.constexpr,
    GRADIENT: tl.constexpr,
    SKIP: tl.constexpr,
    WHOLE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Tile (program 0, program 1) of the block that begins at (row_start, column_start).

    WHOLE: the tile is the whole matrix and finds the positives in itself.
    """
    block, tile = tl.program_id(0), tl.program_id(1)
    at_row, at_column = block * ROWS + tl.arange(0, ROWS), tile * COLUMNS + tl.arange(0, COLUMNS)
    row, column = row_start + at_row, column_start + at_column
    first_row, first = row_start + block * ROWS, column_start + tile * COLUMNS
    inner_row, inner_column = tl.minimum(row, n - 1), tl.minimum(column, m - 1)
    kept = kept_rows(image, inner_row, WIDTH, DEPTH, UPCAST)
    s = similarities(kept, image, inner_row, text, inner_column, WIDTH, DEPTH, UPCAST)
    target = positive_column(row, n, offset)
    is_positive = target[:, None] == column[None, :]
    row_positive, column_positive = own_similarities(
        positive, s, is_positive, inner_row, inner_column, WHOLE, BOTH
    )
    if crosses(first_row, first, offset, ROWS, COLUMNS):
        s = tl.where(is_positive, float("-inf"), s)
    row_id, column_id = tl.load(image_ids + inner_row), tl.load(text_ids + inner_column)
    s = tl.where(different(row_id, column_id, row, column, n, m), s, float("-inf"))
    row_cost = _violation(s, (row_positive - margin)[:, None])
    by_row = (row_cost > 0).to(tl.float32)
    value, gradient = row_cost, by_row
    if BOTH:
        column_cost = _violation(s, (column_positive - margin)[None, :])
        by_column = (column_cost > 0).to(tl.float32)
        value, gradient = row_cost + column_cost, by_row + by_column
    part = block * tl.num_programs(1) + tile
    tl.store(loss + first_loss + part, tl.sum(value))
    if GRADIENT:
        count = tl.sum(by_row, 1)
        anything = tl.max(count, 0)
        tl.store(row_counts + tile * tl.num_programs(0) * ROWS + at_row, count)
        if BOTH:
            count = tl.sum(by_column, 0)
            anything = tl.maximum(anything, tl.max(count, 0))
            tl.store(column_counts + block * tl.num_programs(1) * COLUMNS + at_column, count)
        if not WHOLE:
            tl.store(active + part, (anything > 0).to(tl.int32))
        if (not SKIP) | (anything > 0):
            pointers = ds + at_row.to(tl.int64)[:, None] * stride + at_column[None, :]
            tl.store(pointers, gradient.to(ds.dtype.element_ty))


def hinge_sum_forward(
    image: Tensor,
    text: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    margin: float,
    offset: int,
    both: bool,
    need_image: bool,
    need_text: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss (), d_image (n, D), d_text (M, D)), float32; the gradients of the loss, empty where not needed.

    image (n, D), text (M, D), ids (n,) and (M,) int64.
    """
    image, text = image.contiguous(), text.contiguous()
    image_ids, text_ids = image_ids.contiguous(), text_ids.contiguous()
    (n, width), m = image.shape, text.shape[0]
    tile, gradient = tile_for("hinge_sum_pairs", image), need_image or need_text
    products = Products(image, text, tile, offset, need_image, need_text, torch.float32, scaled=False)
    whole = n <= tile.rows and m <= tile.columns
    counts = Counts(products, next(products.blocks()), both, whole)
    losses = torch.empty(products.tiles, dtype=torch.float32, device=image.device)
    positive = losses if whole else positives(image, text, offset)
    with on(image):
        for block in products.blocks():
            _pairs[products.grid(block)](
                image, text, image_ids, text_ids, positive, products.ds, counts.rows, counts.columns,
                counts.active, losses, margin, n, m, offset, block.row_start, block.column_start,
                block.first_tile, products.stride, WIDTH=width, ROWS=tile.rows, COLUMNS=tile.columns,
                DEPTH=tile.depth, BOTH=both, GRADIENT=gradient, SKIP=products.skippable and not whole,
                WHOLE=whole, UPCAST=INTERPRETED, **options(tile),
            )  # fmt: skip
            if gradient:
                products.multiply(block, None, None, counts.add(block))
        if gradient:
            counts.pull()
    return total(losses), products.d_image, products.d_text


def _constants(tile: Tile, width: int, half: bool) -> dict[str, object]:
    sizes = {"WIDTH": width, "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "UPCAST": False}
    return {**sizes, "BOTH": True, "GRADIENT": True, "SKIP": True, "WHOLE": False}


SPECS = [
    KernelSpec(
        name="hinge_sum_pairs",
        kernel=_pairs,
        pointers={
            **dict.fromkeys(("image", "text", "ds"), "*x"),
            **dict.fromkeys(("image_ids", "text_ids"), "*i64"),
            **dict.fromkeys(("positive", "row_counts", "column_counts", "loss"), "*fp32"),
            "active": "*i32",
        },
        scalars={"margin": "fp32", "stride": "i32", **dict.fromkeys(PAIRS_SIZES, "i32")},
        constants=_constants,
        unaligned=frozenset(PAIRS_SIZES),
    ),
]
