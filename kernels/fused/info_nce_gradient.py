"""The backward of InfoNCE: S again by the forward's arithmetic, a block of P at a time, 6 n M D flops.

`_pairs` makes P = softmax by rows + softmax by columns as a block of dS, without the positives, and sums what the
scale gets on the way; `products.py` makes the gradients of it. The positives' weights, 1 - P of the row and of the
column, are applied in float32. The forward's log-odds give both: see `info_nce.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2s.kernels.fused.launch import INTERPRETED, nothing, on, options, total
from d2s.kernels.fused.positives import positives
from d2s.kernels.fused.products import Products
from d2s.kernels.fused.spec import KernelSpec
from d2s.kernels.fused.sweep import (
    crosses,
    different,
    exponent_of,
    kept_rows,
    own_similarities,
    positive_column,
    similarities,
    softplus_and_sigmoid_2,
    within,
)
from d2s.kernels.fused.tiles import Tile, tile_for

PAIRS_SIZES = ("n", "m", "offset", "row_start", "column_start", "first_sum")


@triton.jit(do_not_specialize=PAIRS_SIZES)
def _pairs(
    image,
    text,
    image_ids,
    text_ids,
    scale,
    grad,
    positive,
    row_odds,
    column_odds,
    ds,
    pull,
    chain,
    scale_sum,
    n,
    m,
    offset,
    row_start,
    column_start,
    first_sum,
    stride,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    DS_SCALE: tl.constexpr,
    BOTH: tl.constexpr,
    STORE: tl.constexpr,
    SCALE: tl.constexpr,
    WHOLE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Tile (program 0, program 1) of a block: P without positives to ds, theirs to pull, the scale's to scale_sum."""
    block, tile = tl.program_id(0), tl.program_id(1)
    at_row, at_column = block * ROWS + tl.arange(0, ROWS), tile * COLUMNS + tl.arange(0, COLUMNS)
    row, column = row_start + at_row, column_start + at_column
    first_row, first = row_start + block * ROWS, column_start + tile * COLUMNS
    inner_row, inner_column = tl.minimum(row, n - 1), tl.minimum(column, m - 1)
    target = positive_column(row, n, offset)
    sign, factor = exponent_of(scale)
    kept = kept_rows(image, inner_row, WIDTH, DEPTH, UPCAST)
    s = sign * similarities(kept, image, inner_row, text, inner_column, WIDTH, DEPTH, UPCAST)
    is_positive = target[:, None] == column[None, :]
    own, column_own = own_similarities(positive, s, is_positive, inner_row, inner_column, WHOLE, BOTH)
    if not WHOLE:
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
    grad: Tensor,
    image: Tensor,
    text: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    scale: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    offset: int,
    both: bool,
    need_image: bool,
    need_text: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_image (n, D), d_text (M, D), d_scale) in the types of the inputs; empty where not needed.

    grad: (), the rest as `info_nce_forward` took and gave it.
    """
    image, text = image.contiguous(), text.contiguous()
    image_ids, text_ids = image_ids.contiguous(), text_ids.contiguous()
    factor, grad = scale.to(torch.float32), grad.to(torch.float32)
    (n, width), m = image.shape, text.shape[0]
    tile = tile_for("info_nce_pairs", image)
    products = Products(image, text, tile, offset, need_image, need_text, image.dtype)
    whole = n <= tile.rows and m <= tile.columns
    positive = row_lse if whole else positives(image, text, offset)
    parts = products.tiles if need_scale else 0
    pull, chain, scale_sum = (torch.empty(k, dtype=torch.float32, device=image.device) for k in (n, 1, parts))
    with on(image):
        for block in products.blocks():
            _pairs[products.grid(block)](
                image, text, image_ids, text_ids, factor, grad, positive, row_lse, column_lse, products.ds, pull,
                chain, scale_sum, n, m, offset, block.row_start, block.column_start, block.first_tile,
                products.stride, WIDTH=width, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
                DS_SCALE=products.scale, BOTH=both, STORE=need_image or need_text, SCALE=need_scale, WHOLE=whole,
                UPCAST=INTERPRETED, **options(tile),
            )  # fmt: skip
            products.multiply(block, pull, chain)
    d_scale = total(scale_sum).to(scale.dtype).reshape(scale.shape) if need_scale else nothing(scale)
    return products.d_image.to(image.dtype), products.d_text.to(text.dtype), d_scale


def _constants(tile: Tile, width: int, half: bool) -> dict[str, object]:
    sizes = {"WIDTH": width, "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "UPCAST": False}
    return {**sizes, "DS_SCALE": 1.0, "BOTH": True, "STORE": True, "SCALE": True, "WHOLE": False}


_FLOATS = ("scale", "grad", "positive", "row_odds", "column_odds", "pull", "chain", "scale_sum")
SPECS = [
    KernelSpec(
        name="info_nce_pairs",
        kernel=_pairs,
        pointers={
            **dict.fromkeys(("image", "text", "ds"), "*x"),
            **dict.fromkeys(("image_ids", "text_ids"), "*i64"),
            **dict.fromkeys(_FLOATS, "*fp32"),
        },
        scalars={"stride": "i32", **dict.fromkeys(PAIRS_SIZES, "i32")},
        constants=_constants,
        unaligned=frozenset({"scale", "grad", *PAIRS_SIZES}),
    )
]
