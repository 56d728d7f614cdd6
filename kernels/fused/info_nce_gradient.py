"""Computes the backward of InfoNCE in 6 B N D flops. Computes S again, by the forward's arithmetic.

P = softmax by rows + softmax by columns. d loss / d S is 0.5 * scale * P at a negative, and
0.5 * scale * (P - 2) at a positive. d_scale = 0.5 * sum over negatives of P * (S - S_positive).

`_pairs` writes blocks of dS, which hold P of the negatives, and partial sums of d_scale. `products.py` turns
dS into gradients and adds the gradient of the positives in float32. `info_nce.py` explains the odds.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2s.kernels.fused.launch import INTERPRETED, not_needed, on_device_of, options, tile_constants, total
from d2s.kernels.fused.positives import positives
from d2s.kernels.fused.products import Products
from d2s.kernels.fused.spec import KernelSpec
from d2s.kernels.fused.sweep import (
    crosses,
    different,
    exponent_of,
    own_similarities,
    positive_column,
    resident_rows,
    similarities,
    softplus_and_sigmoid_2,
    within,
)
from d2s.kernels.fused.tiles import tile_for
from d2s.kernels.sides import Sides


@triton.jit(do_not_specialize=("n", "m", "offset", "row_start", "column_start", "first_sum"))
def _pairs(
    image,  # (B, D)
    text,  # (N, D)
    image_ids,  # (B,)
    text_ids,  # (N,)
    scale,  # (1,)
    grad,  # ()
    positive,  # (B,)
    row_odds,  # (B,)
    column_odds,  # (N,)
    ds,  # (block rows, stride)
    pull,  # (B,), (1 - P by row) + (1 - P by column) of each positive
    chain,  # (1,), 0.5 * grad * scale
    scale_sum,  # (tiles of all blocks,), partial d_scale
    n, m, offset, row_start, column_start, first_sum, stride,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    DS_SCALE: tl.constexpr, BOTH: tl.constexpr, STORE: tl.constexpr, SCALE: tl.constexpr, SINGLE: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Computes tile (program_id(0), program_id(1)) of a block. SINGLE: the tile is the whole matrix."""
    block, tile = tl.program_id(0), tl.program_id(1)
    at_row, at_column = block * ROWS + tl.arange(0, ROWS), tile * COLUMNS + tl.arange(0, COLUMNS)
    row, column = row_start + at_row, column_start + at_column
    first_row, first = row_start + block * ROWS, column_start + tile * COLUMNS
    inner_row, inner_column = tl.minimum(row, n - 1), tl.minimum(column, m - 1)
    target = positive_column(row, n, offset)
    sign, factor = exponent_of(scale)
    resident = resident_rows(image, inner_row, WIDTH, DEPTH, UPCAST)
    s = sign * similarities(resident, image, inner_row, text, inner_column, WIDTH, DEPTH, UPCAST)
    is_positive = target[:, None] == column[None, :]
    own, column_own = own_similarities(positive, s, is_positive, inner_row, inner_column, SINGLE, BOTH)
    if not SINGLE:
        own *= sign
        column_own *= sign
    row_cost, missing = softplus_and_sigmoid_2(tl.load(row_odds + inner_row))
    if crosses(first_row, first, offset, ROWS, COLUMNS):
        here = within(target, first, COLUMNS)
        if BOTH:
            _, more = softplus_and_sigmoid_2(tl.load(column_odds + target, mask=here, other=0.0))
            missing += more
        tl.store(pull + row, missing, mask=here)
    row_id, column_id = tl.load(image_ids + inner_row), tl.load(text_ids + inner_column)
    other = different(row_id, column_id, row, column, n, m) & (target[:, None] != column[None, :])
    above = s - own[:, None]
    p = tl.exp2(tl.where(other, tl.fma(above, factor, -row_cost[:, None]), float("-inf")))
    weighted = p * above
    if BOTH:
        column_cost, _ = softplus_and_sigmoid_2(tl.load(column_odds + inner_column))
        above = s - column_own[None, :]
        q = tl.exp2(tl.where(other, tl.fma(above, factor, -column_cost[None, :]), float("-inf")))
        weighted += q * above
        p += q
    half = 0.5 * tl.load(grad)
    if SCALE:
        part = half * sign * tl.sum(weighted)
        tl.store(scale_sum + first_sum + block * tl.num_programs(1) + tile, part)
    if STORE:
        pointers = ds + at_row.to(tl.int64)[:, None] * stride + at_column[None, :]
        tl.store(pointers, (p * DS_SCALE).to(ds.dtype.element_ty))
    if (block == 0) & (tile == 0):
        tl.store(chain, half * tl.load(scale).to(tl.float32))


def info_nce_backward(
    sides: Sides, scale: Tensor, row_odds: Tensor, column_odds: Tensor, grad: Tensor, need: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns d_image, d_text and d_scale, in the shapes and types of `image`, `text` and `scale`.

    A gradient that `need` does not select is empty. The odds come from `info_nce_forward`. `grad` is the
    gradient with respect to the loss.
    """
    sides = sides.contiguous()
    image, text, image_ids, text_ids, offset, both = sides
    need_scale = need[2]
    factor, grad = scale.to(torch.float32), grad.to(torch.float32)
    (n, width), m = image.shape, text.shape[0]
    tile = tile_for("info_nce_pairs", image)
    products = Products(sides, tile, need[:2], image.dtype)
    single = n <= tile.rows and m <= tile.columns
    positive = row_odds if single else positives(image, text, offset)
    parts = products.tiles if need_scale else 0
    pull, chain, scale_sum = (torch.empty(k, dtype=torch.float32, device=image.device) for k in (n, 1, parts))
    with on_device_of(image):
        for block in products.blocks():
            _pairs[products.grid(block)](
                image, text, image_ids, text_ids, factor, grad, positive, row_odds, column_odds, products.ds, pull,
                chain, scale_sum, n, m, offset, block.row_start, block.column_start, block.first_tile,
                products.stride, DS_SCALE=products.scale, BOTH=both, STORE=any(need[:2]), SCALE=need_scale,
                SINGLE=single, **tile_constants(tile, width, INTERPRETED), **options(tile),
            )  # fmt: skip
            products.multiply(block, pull, chain)
    d_scale = total(scale_sum).to(scale.dtype).reshape(scale.shape) if need_scale else not_needed(scale)
    return products.d_image.to(image.dtype), products.d_text.to(text.dtype), d_scale


_FLAGS = {"BOTH": True, "STORE": True, "SCALE": True, "SINGLE": False}
_FLOATS = ("scale", "grad", "positive", "row_odds", "column_odds", "pull", "chain", "scale_sum")
SPECS = [
    KernelSpec(
        name="info_nce_pairs",
        kernel=_pairs,
        pointers=dict.fromkeys(_FLOATS, "*fp32"),
        scalars={"stride": "i32"},
        constants=lambda tile, width, half: {**tile_constants(tile, width), **_FLAGS, "DS_SCALE": 1.0},
        unaligned=frozenset({"scale", "grad"}),
    )
]
