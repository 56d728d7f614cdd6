"""Implements the sigmoid loss of SigLIP. One sweep of 6 B N D flops computes the loss and the gradients.

Let z = scale * S + bias. A negative costs log(1 + exp(z)), with gradient dz = sigmoid(z). A positive costs
log(1 + exp(-z)), with dz = -sigmoid(-z). dS = scale * dz, d_scale = sum of dz * S, d_bias = sum of dz.

`_pairs` writes a block of dz (see `products.py`) and, for each tile, partial sums of the loss, d_scale and
d_bias. Positives stay out of the block. Their gradients are added in float32.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2s.kernels.fused.launch import INTERPRETED, not_needed, on_device_of, options, tile_constants
from d2s.kernels.fused.products import Products
from d2s.kernels.fused.spec import KernelSpec
from d2s.kernels.fused.sweep import (
    crosses,
    different,
    positive_column,
    resident_rows,
    selected,
    similarities,
    softplus_and_sigmoid,
    within,
)
from d2s.kernels.fused.tiles import tile_for
from d2s.kernels.sides import Sides


@triton.jit(do_not_specialize=("n", "m", "offset", "row_start", "column_start", "first_sum", "all_tiles"))
def _pairs(
    image,  # (B, D)
    text,  # (N, D)
    image_ids,  # (B,)
    text_ids,  # (N,)
    scale,  # (1,)
    bias,  # (1,)
    ds,  # (block rows, stride)
    pull,  # (B,), -dz of the positives
    sums,  # (3, tiles of all blocks): loss, d_scale, d_bias. Without SCALARS: only the loss
    n, m, offset, row_start, column_start, first_sum, all_tiles, stride,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    DS_SCALE: tl.constexpr, STORE: tl.constexpr, SCALARS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Computes tile (program_id(0), program_id(1)) of the block that begins at (row_start, column_start)."""
    block, tile = tl.program_id(0), tl.program_id(1)
    at_row, at_column = block * ROWS + tl.arange(0, ROWS), tile * COLUMNS + tl.arange(0, COLUMNS)
    row, column = row_start + at_row, column_start + at_column
    first_row, first = row_start + block * ROWS, column_start + tile * COLUMNS
    inner_row, inner_column = tl.minimum(row, n - 1), tl.minimum(column, m - 1)
    target = positive_column(row, n, offset)
    resident = resident_rows(image, inner_row, WIDTH, DEPTH, UPCAST)
    s = similarities(resident, image, inner_row, text, inner_column, WIDTH, DEPTH, UPCAST)
    factor, shift = tl.load(scale), tl.load(bias)
    is_positive = target[:, None] == column[None, :]
    if crosses(first_row, first, offset, ROWS, COLUMNS):
        _, towards = softplus_and_sigmoid(-tl.fma(selected(s, is_positive), factor, shift))
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
    sides: Sides, scale: Tensor, bias: Tensor, need: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns (loss, d_image, d_text, d_scale, d_bias) in float32.

    The loss has shape (). Each gradient has the shape of its input, or is empty if `need` does not select it.
    """
    sides = sides.contiguous()
    image, text, image_ids, text_ids, offset, _ = sides
    factor, shift = scale.to(torch.float32), bias.to(torch.float32)
    (n, width), m = image.shape, text.shape[0]
    tile, scalars = tile_for("sigmoid_pairs", image), any(need[2:])
    products = Products(sides, tile, need[:2], torch.float32)
    tiles = products.tiles
    pull = torch.empty(n, dtype=torch.float32, device=image.device)
    sums = pull.new_empty(3 if scalars else 1, tiles)
    with on_device_of(image):
        for block in products.blocks():
            _pairs[products.grid(block)](
                image, text, image_ids, text_ids, factor, shift, products.ds, pull, sums, n, m, offset,
                block.row_start, block.column_start, block.first_tile, tiles, products.stride,
                DS_SCALE=products.scale, STORE=any(need[:2]), SCALARS=scalars,
                **tile_constants(tile, width, INTERPRETED), **options(tile),
            )  # fmt: skip
            products.multiply(block, pull, factor)
    sums = sums.sum(1) if tiles > 1 else sums[:, 0].clone()
    d_scale = sums[1].clone().reshape(scale.shape) if need[2] else not_needed(scale, torch.float32)
    d_bias = sums[2].clone().reshape(bias.shape) if need[3] else not_needed(bias, torch.float32)
    return sums[0].clone(), products.d_image, products.d_text, d_scale, d_bias


SPECS = [
    KernelSpec(
        name="sigmoid_pairs",
        kernel=_pairs,
        pointers=dict.fromkeys(("scale", "bias", "pull", "sums"), "*fp32"),
        scalars={"stride": "i32"},
        constants=lambda tile, width, half: {
            **tile_constants(tile, width), "DS_SCALE": 1.0, "STORE": True, "SCALARS": True
        },
        unaligned=frozenset({"scale", "bias"}),
    )
]  # fmt: skip
