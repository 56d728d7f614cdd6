"""Sorts the channels of GPO in registers: the sort keys, and a bitonic sort within one or a few warps.

The bits of a float sort like the float if those of negative numbers are inverted, except the sign. A key has
these bits in its upper half and the token's position in its lower half. So one sort orders by value, then by
token. Keys have 32 bits for 16-bit features and 64 bits for float32. Padding comes last, so the sorted
positions are a permutation of all tokens.

One warp sorts one or a few channels. The tile is viewed as a cube with sides of 2, whose first axes are the
low bits of a rank. Most rounds of the sort exchange entries along these axes, within the registers of one
thread. Only the highest five bits need exchanges between threads, and none uses shared memory. The sort
accepts any order of its input. For K = 2^k tokens, it takes k (k + 1) / 2 rounds.
"""

import triton
import triton.language as tl
from triton.language.standard import _sum_combine


@triton.constexpr_function
def cube(n: int) -> list[int]:
    """Returns the shape of a cube with n axes of length 2."""
    return [2] * n


@triton.constexpr_function
def _axis_shape(n: int, axis: int) -> list[int]:
    """Returns the shape, with n axes, of a tensor with two entries along `axis`."""
    return [2 if i == axis else 1 for i in range(n)]


@triton.jit
def sort_ascending(x, AXES: tl.constexpr, BITS: tl.constexpr):
    """Sorts the cube x over its first BITS axes, ascending (bitonic sort). Axis i is bit i of the rank."""
    for stage in tl.static_range(1, BITS + 1):
        for i in tl.static_range(stage):
            # The other entry of a pair is the pair's sum minus x. So the compiler needs only one exchange
            # between threads. Use only built-ins, because in the interpreter a call of another function
            # takes longer than a round.
            other = tl.reduce(x, stage - 1 - i, _sum_combine, keep_dims=True) - x
            # Sort the pair ascending, unless the next stage needs it in descending order.
            upper = tl.reshape(tl.arange(0, 2), _axis_shape(AXES, stage - 1 - i))
            if stage < BITS:
                upper = upper ^ tl.reshape(tl.arange(0, 2), _axis_shape(AXES, stage))
            x = tl.where((x > other) != (upper == 1), other, x)
    return x


@triton.jit
def by_channel(x, AXES: tl.constexpr, BITS: tl.constexpr):
    """Returns the cube x as a matrix of channels x ranks. Its first BITS axes become the ranks."""
    for i in tl.static_range(BITS):
        x = tl.permute(tl.reshape(x, (2, 1 << (AXES - 1 - i), 1 << i)), (1, 0, 2))
    return tl.reshape(x, (1 << (AXES - BITS), 1 << BITS))


@triton.jit
def key_of(x, token, real, HALF: tl.constexpr):
    """Returns integer keys that sort x descending, then by token. NaN is first, padding (not `real`) last."""
    # -0 becomes 0, because equal values need equal bits.
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
def value_of(key, dtype: tl.constexpr, HALF: tl.constexpr):
    """Returns the feature values, in float32, that `key_of` put into the keys."""
    if HALF:
        mirrored = ~(key >> 16)
        bits = (mirrored ^ ((mirrored >> 31) & 0x7FFF)).to(tl.int16)
    else:
        mirrored = ~((key >> 32).to(tl.int32))
        bits = mirrored ^ ((mirrored >> 31) & 0x7FFFFFFF)
    return bits.to(dtype, bitcast=True).to(tl.float32)
