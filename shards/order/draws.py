"""Computes random draws as a pure function of (seed, epoch, sample, stream). There is no state to save.

The function, in unsigned 64-bit arithmetic that wraps (>> is the logical shift):

    GAMMA        = 0x9E3779B97F4A7C15
    mix(z)       : z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
                   z = (z ^ (z >> 27)) * 0x94D049BB133111EB
                   return z ^ (z >> 31)
    absorb(h, w) = mix((h ^ mix(w)) + GAMMA)
    hash(s)      = FNV-1a, 64 bits, over the UTF-8 bytes of s
    state        = absorb(absorb(absorb(absorb(0, hash(stream)), seed), epoch), sample)
    draw j       = mix(state + (j + 1) * GAMMA)          j = 0, 1, ...
    uniform j    = (draw j >> 11) * 2**-53               in [0, 1)

The draws of a sample are the output of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) that starts at `state`.
Its `mix` is Stafford's 13th variant. To continue the draws in another array library, implement `mix` and
`expand` there. Start from the result of `states`, or from a sample's `bits(..., count=1)`.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

GAMMA = np.uint64(0x9E3779B97F4A7C15)
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31, _S11 = (np.uint64(s) for s in (30, 27, 31, 11))
_WORD = (1 << 64) - 1

U64 = NDArray[np.uint64]


def mix(z: U64) -> U64:
    """Applies the `mix` of this module's docstring to each entry of a uint64 array of at least one dimension."""
    z = (z ^ (z >> _S30)) * _M1
    z = (z ^ (z >> _S27)) * _M2
    return z ^ (z >> _S31)


def _words(values: ArrayLike) -> U64:
    """Returns integers of any sign as uint64 (two's complement), in an array with at least one dimension."""
    array = np.atleast_1d(np.asarray(values))
    if array.dtype.kind not in "iu":
        raise ValueError(f"samples are of type {array.dtype}, use integers")
    return array.astype(np.uint64, copy=False)


def absorb(state: U64, word: U64) -> U64:
    """Mixes one more 64-bit word into a state. It is the `absorb` of this module's docstring."""
    return mix((state ^ mix(word)) + GAMMA)


def hash_name(stream: str) -> int:
    """Returns the 64-bit FNV-1a hash of the name `stream`."""
    value = 0xCBF29CE484222325
    for byte in stream.encode():
        value = ((value ^ byte) * 0x100000001B3) & _WORD
    return value


def states(seed: int, epoch: int, samples: ArrayLike, stream: str) -> U64:
    """Returns the state from which the draws of each sample start, uint64 of shape (samples,)."""
    state = np.zeros(1, np.uint64)
    for word in (hash_name(stream), seed & _WORD, epoch & _WORD):
        state = absorb(state, np.array([word], np.uint64))
    return absorb(state, _words(samples))


def expand(state: U64, count: int) -> U64:
    """Returns the first `count` draws from each state, uint64 of shape (states, count)."""
    return mix(state[:, None] + np.arange(1, count + 1, dtype=np.uint64) * GAMMA)


def bits(seed: int, epoch: int, samples: ArrayLike, stream: str, count: int = 1) -> U64:
    """Returns `count` draws of 64 random bits for each sample, uint64 of shape (samples, count).

    `seed` is the seed of the training run. `epoch` counts from 0. The lower 64 bits of both are used. `samples`
    are integers in one dimension. `stream` names the purpose of the draws, such as "crop" or "words". Draws of
    different streams are independent.
    """
    return expand(states(seed, epoch, samples, stream), count)


def bits_at(seed: int, epoch: int, samples: ArrayLike, stream: str, counters: ArrayLike) -> U64:
    """Returns draw number `counters[i]` of `samples[i]` for each i, uint64 of shape (samples,)."""
    return mix(states(seed, epoch, samples, stream) + (_words(counters) + np.uint64(1)) * GAMMA)


def to_uniform(random_bits: U64) -> NDArray[np.float64]:
    """Turns 64 random bits into a float64 in [0, 1). Uses the upper 53 bits, which a float64 represents exactly."""
    return (random_bits >> _S11) * 2.0**-53


def uniform(seed: int, epoch: int, samples: ArrayLike, stream: str, count: int = 1) -> NDArray[np.float64]:
    """Returns uniform draws in [0, 1), float64 of shape (samples, count). `bits` describes the arguments."""
    return to_uniform(bits(seed, epoch, samples, stream, count))


def uniform_at(
    seed: int, epoch: int, samples: ArrayLike, stream: str, counters: ArrayLike
) -> NDArray[np.float64]:
    """Returns uniform draws in [0, 1), float64 of shape (samples,). `bits_at` describes the arguments."""
    return to_uniform(bits_at(seed, epoch, samples, stream, counters))
