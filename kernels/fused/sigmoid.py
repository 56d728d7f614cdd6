"""The sigmoid loss of SigLIP: no normaliser, so loss and gradients come from one sweep, 6 n M D flops.

With z = y * -(scale * S + bias), y = 1 for the positive pair and -1 for the others, a pair costs log(1 + exp(z)) and
its gradient by z is sigmoid(z). `_pairs` makes a block of that (see `products.py`) and, per tile, its share of the
loss, of d_scale = sum of dz S and of d_bias = sum of dz. Positives stay out of dS and are applied in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2s.kernels.fused.launch import INTERPRETED, nothing, on, options
from d2s.kernels.fused.products import Products
from d2s.kernels.fused.spec import KernelSpec
from d2s.kernels.fused.sweep import (
    crosses,
    different,
    kept_rows,
    picked,
    positive_column,
    similarities,
    softplus_and_sigmoid,
    within,
)
from d2s.kernels.fused.tiles import Tile, tile_for

PAIRS_SIZES = ("n", "m", "offset", "row_start", "column_start", "first_sum", "all_tiles")


@triton.jit(do_not_specialize=PAIRS_SIZES)
def _pairs(
    image,
    text,
    image_ids,
    text_ids,
    scale,
    bias,
    ds,
    pull,
    sums,
    n,
    m,
    offset,
    row_start,
    column_start,
    first_sum,
    all_tiles,
    stride,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    DS_SCALE: tl.constexpr,
    STORE: tl.constexpr,
    SCALARS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Tile (program 0, program 1) of a block: dS without positives to ds, theirs to pull, and three sums."""
    block, tile = tl.program_id(0), tl.program_id(1)
    at_row, at_column = block * ROWS + tl.arange(0, ROWS), tile * COLUMNS + tl.arange(0, COLUMNS)
    row, column = row_start + at_row, column_start + at_column
    first_row, first = row_start + block * ROWS, column_start + tile * COLUMNS
    inner_row, inner_column = tl.minimum(row, n - 1), tl.minimum(column, m - 1)
    target = positive_column(row, n, offset)
    kept = kept_rows(image, inner_row, WIDTH, DEPTH, UPCAST)
    s = similarities(kept, image, inner_row, text, inner_column, WIDTH, DEPTH, UPCAST)
    factor, shift = tl.load(scale), tl.load(bias)
    is_positive = target[:, None] == column[None, :]
    if crosses(first_row, first, offset, ROWS, COLUMNS):
        _, towards = softplus_and_sigmoid(-tl.fma(picked(s, is_positive), factor, shift))
        tl.store(pull + row, towards, mask=within(target, first, COLUMNS))
    row_id, column_id = tl.load(image_ids + inner_row), tl.load(text_ids + inner_column)
    other = different(row_id, column_id, row, column, n, m) & ~is_positive
    z = tl.fma(s, factor, shift)
    cost, weight = softplus_and_sigmoid(tl.where(is_positive, -z, z))
    weight = tl.where(other | is_positive, weight, 0.0)
    part = sums + first_sum + block * tl.num_programs(1) + tile
    tl.store(part, tl.sum(tl.where(other | is_positive, cost, 0.0)))
    if SCALARS:
        signed = tl.where(is_positive, -weight, weight)
        tl.store(part + all_tiles, tl.sum(signed * s))
        tl.store(part + 2 * all_tiles, tl.sum(signed))
    weight = tl.where(other, weight, 0.0)
    if STORE:
        pointers = ds + at_row.to(tl.int64)[:, None] * stride + at_column[None, :]
        tl.store(pointers, (weight * DS_SCALE).to(ds.dtype.element_ty))


def sigmoid_forward(
    image: Tensor,
    text: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    scale: Tensor,
    bias: Tensor,
    offset: int,
    need_image: bool,
    need_text: bool,
    need_scale: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss (), d_image (n, D), d_text (M, D), d_scale, d_bias), float32, the last two shaped as their inputs.

    image (n, D), text (M, D), ids (n,) and (M,) int64, scale and bias one entry each. The gradients of the loss;
    empty where not needed.
    """
    image, text = image.contiguous(), text.contiguous()
    image_ids, text_ids = image_ids.contiguous(), text_ids.contiguous()
    factor, shift = scale.to(torch.float32), bias.to(torch.float32)
    (n, width), m = image.shape, text.shape[0]
    tile, scalars = tile_for("sigmoid_pairs", image), need_scale or need_bias
    products = Products(image, text, tile, offset, need_image, need_text, torch.float32)
    tiles = products.tiles
    pull = torch.empty(n, dtype=torch.float32, device=image.device)
    sums = pull.new_empty(3 if scalars else 1, tiles)
    with on(image):
        for block in products.blocks():
            _pairs[products.grid(block)](
                image, text, image_ids, text_ids, factor, shift, products.ds, pull, sums, n, m, offset,
                block.row_start, block.column_start, block.first_tile, tiles, products.stride, WIDTH=width,
                ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, DS_SCALE=products.scale,
                STORE=need_image or need_text, SCALARS=scalars, UPCAST=INTERPRETED, **options(tile),
            )  # fmt: skip
            products.multiply(block, pull, factor)
    sums = sums.sum(1) if tiles > 1 else sums[:, 0].clone()
    d_scale = sums[1].clone().reshape(scale.shape) if need_scale else nothing(scale, torch.float32)
    d_bias = sums[2].clone().reshape(bias.shape) if need_bias else nothing(bias, torch.float32)
    return sums[0].clone(), products.d_image, products.d_text, d_scale, d_bias


def _constants(tile: Tile, width: int, half: bool) -> dict[str, object]:
    sizes = {"WIDTH": width, "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "UPCAST": False}
    return {**sizes, "DS_SCALE": 1.0, "STORE": True, "SCALARS": True}


SPECS = [
    KernelSpec(
        name="sigmoid_pairs",
        kernel=_pairs,
        pointers={
            **dict.fromkeys(("image", "text", "ds"), "*x"),
            **dict.fromkeys(("image_ids", "text_ids"), "*i64"),
            **dict.fromkeys(("scale", "bias", "pull", "sums"), "*fp32"),
        },
        scalars={"stride": "i32", **dict.fromkeys(PAIRS_SIZES, "i32")},
        constants=_constants,
        unaligned=frozenset({"scale", "bias", *PAIRS_SIZES}),
    )
]
