"""GPO pooling: every channel sorted along its tokens in registers, then the weighted sum.

A float's bits, negative numbers mirrored, sort like the float. With the token in the low half of the integer one
bitonic sort orders by value, then by token, and carries the token along: 32 bits for 16-bit features, 64 for
float32. Tokens that are left out come last, so that the order is always a permutation of all tokens, and the
backward writes every place of the features' gradient once: no atomics, nothing to clear.

One warp sorts one or a few whole channels. The tile is seen as a cube of sides of 2, and the low bits of a rank,
which meet in most rounds of the sort, are the cube's first axes, which lie in the registers of a thread; only the
highest five are exchanged between threads, and none through shared memory. Which token starts in which place does
not matter, so nothing is moved before the sort.

Work: log2(K) (log2(K) + 1) / 2 rounds on K rounded up to a power of two. Kept for the backward: 2 bytes an entry
of order, and 4 of sorted values where the weights get a gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.standard import _sum_combine

from d2s.kernels.fused.launch import cdiv, nothing, on, power_of_two, storage
from d2s.kernels.fused.spec import KernelSpec
from d2s.kernels.fused.tiles import Tile, tile_for

# The most tokens that are sorted in registers. More go to the chunked implementation.
TOKENS = 4096
# The most tokens that one warp sorts.
WARP = 1024
# Tile of the backward, of ranks and of channels.
RANKS, CHANNELS = 32, 64
SIZES = ("tokens", "width")


@triton.constexpr_function
def _cube(n: int) -> list[int]:
    return [2] * n


@triton.constexpr_function
def _axis_shape(n: int, axis: int) -> list[int]:
    return [2 if i == axis else 1 for i in range(n)]


@triton.jit
def _sort(x, AXES: tl.constexpr, BITS: tl.constexpr):
    """Ascending over the first axes of the cube x, of which axis i is bit i of the rank.

    All in one function of built-ins: the interpreter takes longer for one call of another than for a round.
    """
    for stage in tl.static_range(1, BITS + 1):
        for i in tl.static_range(stage):
            # The sum of both less the one is the other; the compiler is left with one exchange between lanes.
            other = tl.reduce(x, stage - 1 - i, _sum_combine, keep_dims=True) - x
            # Neighbours ascend, but where the next stage wants them in descending order.
            upper = tl.reshape(tl.arange(0, 2), _axis_shape(AXES, stage - 1 - i))
            if stage < BITS:
                upper = upper ^ tl.reshape(tl.arange(0, 2), _axis_shape(AXES, stage))
            x = tl.where((x > other) != (upper == 1), other, x)
    return x


@triton.jit
def _by_channel(x, AXES: tl.constexpr, BITS: tl.constexpr):
    """The cube x in the order of (channel, rank): its first axes, one by one, go behind those of the channels."""
    for i in tl.static_range(BITS):
        x = tl.permute(tl.reshape(x, (2, 1 << (AXES - 1 - i), 1 << i)), (1, 0, 2))
    return tl.reshape(x, (1 << (AXES - BITS), 1 << BITS))


@triton.jit
def _key_of(x, token, real, HALF: tl.constexpr):
    """Integers (k, d) that ascend where x descends, then with the token; tokens that are not real come last."""
    # -0 equals 0, but only after this do their bits. What is no number is the largest.
    x = tl.where(x == 0, 0.0, x.to(tl.float32)).to(x.dtype)
    if HALF:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32)
        key = ~(bits ^ ((bits >> 31) & 0x7FFF))
        key = tl.where(x != x, -32768, tl.where(real, key, 32767))
        return (key << 16) | token
    else:
        bits = x.to(tl.int32, bitcast=True)
        key = ~(bits ^ ((bits >> 31) & 0x7FFFFFFF))
        key = tl.where(x != x, -2147483648, tl.where(real, key, 2147483647))
        return (key.to(tl.int64) << 32) | token.to(tl.int64)


@triton.jit
def _value_of(key, dtype: tl.constexpr, HALF: tl.constexpr):
    """The float32 values of keys."""
    if HALF:
        mirrored = ~(key >> 16)
        bits = (mirrored ^ ((mirrored >> 31) & 0x7FFF)).to(tl.int16)
    else:
        mirrored = ~((key >> 32).to(tl.int32))
        bits = mirrored ^ ((mirrored >> 31) & 0x7FFFFFFF)
    return bits.to(dtype, bitcast=True).to(tl.float32)


@triton.jit(do_not_specialize=SIZES)
def _forward(
    features,
    weights,
    mask,
    pooled,
    order,
    value,
    tokens,
    width,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BITS: tl.constexpr,
    AXES: tl.constexpr,
    HALF: tl.constexpr,
    ORDER: tl.constexpr,
    VALUE: tl.constexpr,
):
    """order, value (B, D, K): token and value of each rank; BLOCK_K = 2^BITS, BLOCK_K * BLOCK_D = 2^AXES."""
    blocks = tl.cdiv(width, BLOCK_D)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    d = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_K)
    real = tl.load(mask + b * tokens + k, mask=k < tokens, other=0) != 0
    # A sample's own entries are counted in 32 bits: 64 for each of them would not fit the registers.
    sample = b * tokens * width
    at = k[:, None] * width + d[None, :]
    x = tl.load(features + sample + at, mask=real[:, None] & (d < width)[None, :], other=0.0)
    key = _key_of(x, k[:, None], real[:, None], HALF)
    key = _sort(tl.reshape(key, _cube(AXES)), AXES, BITS)
    key = _by_channel(key, AXES, BITS)
    length = tl.sum(real.to(tl.int32), 0)
    w = tl.load(weights + b * tokens + k, mask=k < length, other=0.0).to(tl.float32)
    ordered = tl.where((k < length)[None, :], _value_of(key, features.dtype.element_ty, HALF), 0.0)
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
    grad,
    weights,
    mask,
    order,
    value,
    d_features,
    d_weights,
    tokens,
    width,
    BLOCK_K: tl.constexpr,
    RANKS: tl.constexpr,
    CHANNELS: tl.constexpr,
    FEATURES: tl.constexpr,
    WEIGHTS: tl.constexpr,
):
    """RANKS ranks of one sample, over all channels in ascending order."""
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
            # The order holds every token once, so every place is written once, those left out with zeros.
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
    features: Tensor, weights: Tensor, mask: Tensor, need_features: bool, need_weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(pooled (B, D) in the features' type, order (B, D * K) int16, value (B, D * K) float32).

    features (B, K, D), weights (B, K), mask (B, K) bool; see `d2s.kernels.functional.gpo_pool`. order is there
    for the gradient of the features, value for that of the weights; else they have no entries.
    """
    batch, tokens, width = features.shape
    if tokens > TOKENS:
        from d2s.kernels import chunked

        return chunked.gpo_forward(features, weights, mask, need_features, need_weights)
    kept = (batch, width * tokens)
    order, value = nothing(features, torch.int16), nothing(features, torch.float32)
    if need_features:
        order = features.new_empty(kept, dtype=torch.int16)
    if need_weights:
        value = features.new_empty(kept, dtype=torch.float32)
    if 0 in features.shape:
        return features.new_zeros(batch, width), order, value
    pooled = features.new_empty(batch, width, dtype=storage(features.dtype))
    constants, warps = _sizes(tile_for("gpo_forward", features), tokens, features.element_size() == 2)
    with on(features):
        # One axis: the others end at 65,535.
        _forward[(cdiv(width, constants["BLOCK_D"]) * batch,)](
            features.contiguous(), weights.contiguous(), mask.contiguous(), pooled, order, value, tokens, width,
            ORDER=need_features, VALUE=need_weights, **constants, num_warps=warps,
        )  # fmt: skip
    return pooled.to(features.dtype), order, value


def gpo_keeps_values(features: Tensor) -> bool:
    """Whether the backward reads the sorted values that the forward kept, rather than the features again."""
    if features.shape[1] > TOKENS:
        from d2s.kernels import chunked

        return chunked.gpo_keeps_values(features)
    return True


def gpo_backward(
    grad: Tensor,
    features: Tensor,
    weights: Tensor,
    mask: Tensor,
    order: Tensor,
    value: Tensor,
    need_features: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor]:
    """(d_features (B, K, D), d_weights (B, K)), in the types of grad and weights; order, value: of `gpo_forward`.

    The features are read where a longer sequence goes to the chunked implementation.
    """
    (batch, tokens), width, dtype = weights.shape, grad.shape[1], grad.dtype
    if tokens > TOKENS:
        from d2s.kernels import chunked

        return chunked.gpo_backward(grad, features, weights, mask, order, value, need_features, need_weights)
    d_features, d_weights = nothing(grad, dtype), nothing(weights)
    if need_features:
        d_features = grad.new_empty(batch, tokens, width, dtype=storage(dtype))
    if need_weights:
        d_weights = torch.zeros_like(weights, dtype=storage(weights.dtype)).contiguous()
    if 0 not in (batch, tokens, width) and (need_features or need_weights):
        with on(grad):
            _backward[(cdiv(tokens, RANKS) * batch,)](
                grad.contiguous(), weights.contiguous(), mask.contiguous(), order, value, d_features, d_weights,
                tokens, width, BLOCK_K=power_of_two(tokens), RANKS=RANKS, CHANNELS=CHANNELS,
                FEATURES=need_features, WEIGHTS=need_weights, num_warps=4,
            )  # fmt: skip
    return d_features.to(dtype), d_weights.to(weights.dtype)


def _sizes(tile: Tile, tokens: int, half: bool) -> tuple[dict[str, object], int]:
    """The forward's constants and warps. Of a tile only rows * columns counts: what a program sorts."""
    block_k = power_of_two(max(tokens, 2))
    block_d = max(1, tile.rows * tile.columns // block_k)
    axes = (block_k * block_d).bit_length() - 1
    sizes = {
        "BLOCK_K": block_k,
        "BLOCK_D": block_d,
        "BITS": block_k.bit_length() - 1,
        "AXES": axes,
        "HALF": half,
    }
    return sizes, max(tile.warps, block_k // WARP)


def _forward_constants(tile: Tile, width: int, half: bool) -> dict[str, object]:
    """For kernels of GPO the width is the number of tokens."""
    return {**_sizes(tile, width, half)[0], "ORDER": True, "VALUE": True}


def _backward_constants(tile: Tile, width: int, half: bool) -> dict[str, object]:
    sizes = {"BLOCK_K": power_of_two(width), "RANKS": RANKS, "CHANNELS": CHANNELS}
    return {**sizes, "FEATURES": True, "WEIGHTS": True}


_SIZES = dict.fromkeys(SIZES, "i32")
SPECS = [
    KernelSpec(
        name="gpo_forward",
        kernel=_forward,
        pointers={
            **dict.fromkeys(("features", "weights", "pooled"), "*x"),
            "mask": "*i1", "order": "*i16", "value": "*fp32",
        },
        scalars=_SIZES,
        constants=_forward_constants,
        options=lambda tile, tokens, half: {"num_warps": _sizes(tile, tokens, half)[1]},
        unaligned=frozenset(SIZES),
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
        scalars=_SIZES,
        constants=_backward_constants,
        options=lambda tile, tokens, half: {"num_warps": 4},
        unaligned=frozenset(SIZES),
        dots=False,
        widths=(577,),
    ),
]  # fmt: skip
