"""Implements GPO pooling: sorts each channel along the tokens in registers, then takes the weighted sum.

pooled[b, d] = sum over k of weights[b, k] * ordered[b, d, k], where `ordered` has each channel's real tokens
in descending order. d_weights[b, k] = sum over d of grad[b, d] * ordered[b, d, k]. The token of rank k gets
the gradient grad[b, d] * weights[b, k].

The sort (`channel_sort.py`) gives a permutation of all tokens. So the backward writes every entry of the
features' gradient exactly once, without atomics or clearing. The forward saves 2 bytes per entry for the
order. If the weights need a gradient, it also saves 4 bytes per entry for the sorted values.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2s.kernels import chunked
from d2s.kernels.fused.channel_sort import by_channel, cube, key_of, sort_ascending, value_of
from d2s.kernels.fused.launch import cdiv, not_needed, on_device_of, power_of_two, storage
from d2s.kernels.fused.spec import KernelSpec
from d2s.kernels.fused.tiles import Tile, tile_for

# The most tokens that are sorted in registers. Longer samples use the chunked implementation.
TOKENS = 4096
# The most tokens that one warp sorts.
WARP = 1024
# Ranks and channels in a tile of the backward.
RANKS, CHANNELS = 32, 64
SIZES = ("tokens", "width")


@triton.jit(do_not_specialize=SIZES)
def _forward(
    features,  # (B, K, D)
    weights,  # (B, K)
    mask,  # (B, K)
    pooled,  # (B, D)
    order,  # (B, D, K), the token of each rank
    value,  # (B, D, K), the value of each rank
    tokens, width,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BITS: tl.constexpr, AXES: tl.constexpr, HALF: tl.constexpr,
    ORDER: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """Pools BLOCK_D channels of one sample. BLOCK_K = 2^BITS >= tokens, and BLOCK_K * BLOCK_D = 2^AXES."""
    blocks = tl.cdiv(width, BLOCK_D)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    d = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_K)
    real = tl.load(mask + b * tokens + k, mask=k < tokens, other=0) != 0
    # Offsets within a sample have 32 bits, because 64 bits per entry would not fit into the registers.
    sample = b * tokens * width
    at = k[:, None] * width + d[None, :]
    x = tl.load(features + sample + at, mask=real[:, None] & (d < width)[None, :], other=0.0)
    key = key_of(x, k[:, None], real[:, None], HALF)
    key = sort_ascending(tl.reshape(key, cube(AXES)), AXES, BITS)
    key = by_channel(key, AXES, BITS)
    length = tl.sum(real.to(tl.int32), 0)
    w = tl.load(weights + b * tokens + k, mask=k < length, other=0.0).to(tl.float32)
    ordered = tl.where((k < length)[None, :], value_of(key, features.dtype.element_ty, HALF), 0.0)
    out = tl.sum(ordered * w[None, :], 1)
    tl.store(pooled + b * width + d, out.to(pooled.dtype.element_ty), mask=d < width)
    at = d[:, None] * tokens + k[None, :]
    inside = (d < width)[:, None] & (k < tokens)[None, :]
    if ORDER:
        tl.store(order + sample + at, key.to(tl.int16), mask=inside)
    if VALUE:
        tl.store(value + sample + at, ordered, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _backward(
    grad,  # (B, D)
    weights,  # (B, K)
    mask,  # (B, K)
    order,  # (B, D, K)
    value,  # (B, D, K)
    d_features,  # (B, K, D)
    d_weights,  # (B, K)
    tokens, width,
    BLOCK_K: tl.constexpr, RANKS: tl.constexpr, CHANNELS: tl.constexpr, FEATURES: tl.constexpr,
    WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Computes the gradients for RANKS ranks (sorted positions) of one sample. Sums ascend by channel."""
    blocks = tl.cdiv(tokens, RANKS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    every = tl.arange(0, BLOCK_K)
    real = tl.load(mask + b * tokens + every, mask=every < tokens, other=0) != 0
    length = tl.sum(real.to(tl.int32), 0)
    k = tl.program_id(0) % blocks * RANKS + tl.arange(0, RANKS)
    used = k < length
    w = tl.load(weights + b * tokens + k, mask=used, other=0.0).to(tl.float32)
    d_w = tl.zeros((RANKS,), tl.float32)
    for start in range(0, width, CHANNELS):
        d = start + tl.arange(0, CHANNELS)
        inside = (d < width)[:, None] & (k < tokens)[None, :]
        at = (b * width + d)[:, None] * tokens + k[None, :]
        g = tl.load(grad + b * width + d, mask=d < width, other=0.0).to(tl.float32)[:, None]
        if FEATURES:
            # The order holds every token once, so each entry is written once. Padding gets zeros.
            token = tl.load(order + at, mask=inside, other=0).to(tl.int32)
            to = (b * tokens + token) * width + d[:, None]
            spread = tl.where(used[None, :], g * w[None, :], 0.0)
            tl.store(d_features + to, spread.to(d_features.dtype.element_ty), mask=inside)
        if WEIGHTS:
            d_w += tl.sum(tl.load(value + at, mask=inside, other=0.0) * g, 0)
    if WEIGHTS:
        to = d_weights + b * tokens + k
        tl.store(to, tl.where(used, d_w, 0.0).to(d_weights.dtype.element_ty), mask=k < tokens)


def gpo_forward(
    features: Tensor, weights: Tensor, mask: Tensor, need: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (pooled, order, value). See `d2s.kernels.functional.gpo_pool`.

    `pooled` has shape (B, D) and the features' type. `order` (int16) and `value` (float32), of shape
    (B, D * K), hold each channel's sorted token positions and values. The gradient of the features needs
    `order`, and the gradient of the weights needs `value`. `need` tells which of the two are computed.
    """
    batch, tokens, width = features.shape
    if tokens > TOKENS:
        return chunked.gpo_forward(features, weights, mask, need)
    shape = (batch, width * tokens)
    order = features.new_empty(shape if need[0] else 0, dtype=torch.int16)
    value = features.new_empty(shape if need[1] else 0, dtype=torch.float32)
    if 0 in features.shape:
        return features.new_zeros(batch, width), order, value
    pooled = features.new_empty(batch, width, dtype=storage(features.dtype))
    constants, warps = _sizes(tile_for("gpo_forward", features), tokens, features.element_size() == 2)
    with on_device_of(features):
        # Use the first grid axis only, because the others are limited to 65,535 programs.
        _forward[(cdiv(width, constants["BLOCK_D"]) * batch,)](
            features.contiguous(), weights.contiguous(), mask.contiguous(), pooled, order, value, tokens, width,
            ORDER=need[0], VALUE=need[1], **constants, num_warps=warps,
        )  # fmt: skip
    return pooled.to(features.dtype), order, value


def gpo_saves_values(features: Tensor) -> bool:
    """Returns whether `gpo_forward` saves the sorted values. If not, `gpo_backward` reads `features`."""
    return features.shape[1] <= TOKENS or chunked.gpo_saves_values(features)


def gpo_backward(
    grad: Tensor,
    features: Tensor,
    weights: Tensor,
    mask: Tensor,
    order: Tensor,
    value: Tensor,
    need: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Returns d_features, (B, K, D) in the type of `grad`, and d_weights, (B, K) in the type of `weights`."""
    (batch, tokens), width, dtype = weights.shape, grad.shape[1], grad.dtype
    if tokens > TOKENS:
        return chunked.gpo_backward(grad, features, weights, mask, order, value, need)
    d_features, d_weights = not_needed(grad, dtype), not_needed(weights)
    if need[0]:
        d_features = grad.new_empty(batch, tokens, width, dtype=storage(dtype))
    if need[1]:
        d_weights = torch.zeros_like(weights, dtype=storage(weights.dtype)).contiguous()
    if 0 not in (batch, tokens, width) and any(need):
        with on_device_of(grad):
            _backward[(cdiv(tokens, RANKS) * batch,)](
                grad.contiguous(), weights.contiguous(), mask.contiguous(), order, value, d_features, d_weights,
                tokens, width, BLOCK_K=power_of_two(tokens), RANKS=RANKS, CHANNELS=CHANNELS,
                FEATURES=need[0], WEIGHTS=need[1], num_warps=4,
            )  # fmt: skip
    return d_features.to(dtype), d_weights.to(weights.dtype)


def _sizes(tile: Tile, tokens: int, half: bool) -> tuple[dict[str, object], int]:
    """Returns the forward's constants and number of warps. `half`: the features have 16 bits."""
    block_k = power_of_two(max(tokens, 2))
    block_d = max(1, tile.rows * tile.columns // block_k)
    bits, axes = block_k.bit_length() - 1, (block_k * block_d).bit_length() - 1
    sizes = {"BLOCK_K": block_k, "BLOCK_D": block_d, "BITS": bits, "AXES": axes, "HALF": half}
    return sizes, max(tile.warps, block_k // WARP)


_BACKWARD = {"RANKS": RANKS, "CHANNELS": CHANNELS, "FEATURES": True, "WEIGHTS": True}
# In these specs, the `width` of a KernelSpec is the number of tokens.
SPECS = [
    KernelSpec(
        name="gpo_forward",
        kernel=_forward,
        pointers={
            **dict.fromkeys(("features", "weights", "pooled"), "*x"),
            "mask": "*i1", "order": "*i16", "value": "*fp32",
        },
        constants=lambda tile, tokens, half: {**_sizes(tile, tokens, half)[0], "ORDER": True, "VALUE": True},
        options=lambda tile, tokens, half: {"num_warps": _sizes(tile, tokens, half)[1]},
        dots=False,
        widths=(50, 577),
    ),
    KernelSpec(
        name="gpo_backward",
        kernel=_backward,
        pointers={
            **dict.fromkeys(("grad", "weights", "d_features", "d_weights"), "*x"),
            "mask": "*i1", "order": "*i16", "value": "*fp32",
        },
        constants=lambda tile, tokens, half: {"BLOCK_K": power_of_two(tokens), **_BACKWARD},
        options=lambda tile, tokens, half: {"num_warps": 4},
        dots=False,
        widths=(577,),
    ),
]  # fmt: skip
