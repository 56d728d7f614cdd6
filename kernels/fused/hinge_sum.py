"""Computes the hinge loss over all negatives, and its gradients, in one sweep of 6 B N D flops.

loss = sum over negatives of [margin + S_ij - S_ii]+ + [margin + S_ij - S_jj]+. The second term needs `both`.
A term above 0 is a violation. dS of a negative is its number of violations. dS of a positive is minus the
number of violations in its row and column.

The dS of a negative is 0, 1 or 2, exact in any type. It depends on the similarities of the pair and of two
positives. `positives.py` computes the positives first, by the same arithmetic as the sweep. So a negative
equal to its positive violates a margin of 0 by exactly 0. `_pairs` then writes one block of dS (see
`products.py`), partial losses, and the number of violations in each row and column of each tile.
`hinge_lists.py` adds up these counts and lists the tiles with violations. The products skip all other tiles.
Last, the gradient of the positives is added.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2s.kernels.fused.hinge_lists import Counts
from d2s.kernels.fused.launch import INTERPRETED, on_device_of, options, tile_constants, total
from d2s.kernels.fused.positives import positives
from d2s.kernels.fused.products import Products
from d2s.kernels.fused.spec import KernelSpec
from d2s.kernels.fused.sweep import (
    crosses,
    different,
    own_similarities,
    positive_column,
    resident_rows,
    similarities,
)
from d2s.kernels.fused.tiles import tile_for
from d2s.kernels.sides import Sides


@triton.jit
def _violation(s, threshold):
    """Returns the larger of s - threshold and 0. NaN stays NaN."""
    v = s - threshold
    return tl.where(v <= 0, 0.0, v)


@triton.jit(do_not_specialize=("n", "m", "offset", "row_start", "column_start", "first_loss"))
def _pairs(
    image,  # (B, D)
    text,  # (N, D)
    image_ids,  # (B,)
    text_ids,  # (N,)
    positive,  # (B,)
    ds,  # (block rows, stride)
    row_counts,  # (column tiles, block rows), violations in each tile
    column_counts,  # (row tiles, block columns)
    active,  # (row tiles, column tiles), 1 if a tile has violations
    loss,  # (tiles of all blocks,)
    margin, n, m, offset, row_start, column_start, first_loss, stride,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BOTH: tl.constexpr,
    GRADIENT: tl.constexpr, SKIP: tl.constexpr, SINGLE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Computes tile (program_id(0), program_id(1)) of the block that begins at (row_start, column_start).

    SINGLE: the tile is the whole matrix. SKIP: the program does not write `ds` for a tile without violations.
    """
    block, tile = tl.program_id(0), tl.program_id(1)
    at_row, at_column = block * ROWS + tl.arange(0, ROWS), tile * COLUMNS + tl.arange(0, COLUMNS)
    row, column = row_start + at_row, column_start + at_column
    first_row, first = row_start + block * ROWS, column_start + tile * COLUMNS
    inner_row, inner_column = tl.minimum(row, n - 1), tl.minimum(column, m - 1)
    resident = resident_rows(image, inner_row, WIDTH, DEPTH, UPCAST)
    s = similarities(resident, image, inner_row, text, inner_column, WIDTH, DEPTH, UPCAST)
    target = positive_column(row, n, offset)
    is_positive = target[:, None] == column[None, :]
    row_positive, column_positive = own_similarities(
        positive, s, is_positive, inner_row, inner_column, SINGLE, BOTH
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
        if not SINGLE:
            tl.store(active + part, (anything > 0).to(tl.int32))
        if (not SKIP) | (anything > 0):
            pointers = ds + at_row.to(tl.int64)[:, None] * stride + at_column[None, :]
            tl.store(pointers, gradient.to(ds.dtype.element_ty))


def hinge_sum_forward(sides: Sides, margin: float, need: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (loss, d_image, d_text) in float32. `need` tells whether d_image and d_text are computed."""
    sides = sides.contiguous()
    image, text, image_ids, text_ids, offset, both = sides
    (n, width), m = image.shape, text.shape[0]
    tile, gradient = tile_for("hinge_sum_pairs", image), any(need)
    products = Products(sides, tile, need, torch.float32, scaled=False)
    single = n <= tile.rows and m <= tile.columns
    counts = Counts(products, next(products.blocks()), single)
    losses = torch.empty(products.tiles, dtype=torch.float32, device=image.device)
    positive = losses if single else positives(image, text, offset)
    with on_device_of(image):
        for block in products.blocks():
            _pairs[products.grid(block)](
                image, text, image_ids, text_ids, positive, products.ds, counts.rows, counts.columns,
                counts.active, losses, margin, n, m, offset, block.row_start, block.column_start,
                block.first_tile, products.stride, BOTH=both, GRADIENT=gradient,
                SKIP=products.skippable and not single, SINGLE=single,
                **tile_constants(tile, width, INTERPRETED), **options(tile),
            )  # fmt: skip
            if gradient:
                products.multiply(block, None, None, counts.add(block))
        if gradient:
            counts.pull()
    return total(losses), products.d_image, products.d_text


SPECS = [
    KernelSpec(
        name="hinge_sum_pairs",
        kernel=_pairs,
        pointers={
            **dict.fromkeys(("positive", "row_counts", "column_counts", "loss"), "*fp32"),
            "active": "*i32",
        },
        scalars={"margin": "fp32", "stride": "i32"},
        constants=lambda tile, width, half: {
            **tile_constants(tile, width), "BOTH": True, "GRADIENT": True, "SKIP": True, "SINGLE": False
        },
    ),
]  # fmt: skip
