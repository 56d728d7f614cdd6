"""Sorts rows of floats in descending order with numpy, several times as fast as torch.

numpy's fast sort returns only values, not their positions, so the position becomes part of the sorted key.
The bits of a float, with negative numbers mirrored, sort like the float. A 32-bit key holds the upper bits of
the value and, below them, the position. It orders values except for their last bits; neighbours in the wrong
order are swapped afterwards. They are few: among 577 normally distributed values, about five pairs agree in
22 bits. If there are many, 64-bit keys are used, which hold the full value and position, at half the speed.
"""

import sys

import numpy as np
import torch

# Limits of the repair by swaps: wrong neighbours per entry, and rounds. Beyond them, 64-bit keys are used.
MOST = 1 / 16
ROUNDS = 48


class Scratch:
    """Buffers that a thread reuses, for samples of `entries` and channel blocks of `block` entries."""

    def __init__(self, entries: int, block: int) -> None:
        self.values = np.empty(entries, dtype=np.float32)
        self.ordered = np.empty(block, dtype=np.float32)
        self.narrow = np.empty(block, dtype=np.int32)
        self.wide = np.empty(block, dtype=np.int64)

    def places(self, source: np.ndarray) -> torch.Tensor:
        """Returns the source as an int64 tensor, in the memory of `self.wide`."""
        wide = self.wide[: source.size].reshape(source.shape)
        np.copyto(wide, source)
        return torch.from_numpy(wide)


def sort_values(values: np.ndarray, scratch: Scratch) -> np.ndarray:
    """Returns values (D, L) float32, each row in descending order, in the memory of scratch.narrow."""
    keys = _keys(values, scratch)
    np.invert(keys, out=keys)
    keys.sort(axis=1)
    np.invert(keys, out=keys)
    return _mirror(keys, keys, values.view(np.int32)).view(np.float32)


def sort_with_source(values: np.ndarray, ordered: np.ndarray, scratch: Scratch) -> np.ndarray:
    """Sorts each row of values (D, L) float32 in descending order and writes it to ordered (D, L).

    The values must not contain -0. Returns source (D, L) int32: the position in its row that each value came
    from. The sort is stable. `source` lies in the memory of scratch.narrow.
    """
    source = _sort_narrow(values, ordered, scratch)
    if source is None:
        source = _sort_wide(values, scratch)
        take(values, scratch.places(source), ordered)
    return source


def _mirror(bits: np.ndarray, out: np.ndarray, scratch: np.ndarray) -> np.ndarray:
    """Flips all bits but the sign in negative int32 numbers. It is its own inverse. `out` may be `bits`."""
    np.right_shift(bits, 31, out=scratch)
    np.bitwise_and(scratch, 0x7FFFFFFF, out=scratch)
    return np.bitwise_xor(bits, scratch, out=out)


def _keys(values: np.ndarray, scratch: Scratch) -> np.ndarray:
    """Returns int32 keys that sort like values (D, L), in the memory of scratch.narrow."""
    keys = scratch.narrow[: values.size].reshape(values.shape)
    return _mirror(values.view(np.int32), keys, keys)


def take(values: np.ndarray, places: torch.Tensor, out: np.ndarray) -> None:
    """Writes out[d, k] = values[d, places[d, k]], all (D, L); `places` comes from `Scratch.places`."""
    # torch gathers, because numpy needs positions in the flat matrix, and computing these costs as much as
    # the gathering.
    torch.gather(torch.from_numpy(values), 1, places, out=torch.from_numpy(out))


def put(values: np.ndarray, places: torch.Tensor, out: np.ndarray) -> None:
    """Writes out[d, places[d, k]] = values[d, k]: the inverse of `take`."""
    torch.from_numpy(out).scatter_(1, places, torch.from_numpy(values))


def _sort_narrow(values: np.ndarray, ordered: np.ndarray, scratch: Scratch) -> np.ndarray | None:
    """Computes `sort_with_source` with 32-bit keys; None if too many values agree in their upper bits."""
    length = values.shape[1]
    low = (1 << (length - 1).bit_length()) - 1
    keys = _keys(values, scratch)
    # The inverted key is sorted ascending, which sorts the values descending; the position is not inverted.
    np.bitwise_or(keys, low, out=keys)
    np.bitwise_xor(keys, ~np.arange(length, dtype=np.int32), out=keys)
    keys.sort(axis=1)
    np.bitwise_and(keys, low, out=keys)
    take(values, scratch.places(keys), ordered)
    return keys if _repair(ordered, keys) else None


def _repair(ordered: np.ndarray, source: np.ndarray) -> bool:
    """Swaps neighbours in `ordered` and `source` until all rows descend; False if this takes too long."""
    length = ordered.shape[1]
    wrong = np.flatnonzero(ordered[:, 1:] > ordered[:, :-1])
    if wrong.size == 0:
        return True
    if wrong.size > MOST * ordered.size:
        return False
    wrong += wrong // (length - 1)
    value, place = ordered.reshape(-1), source.reshape(-1)
    for _ in range(ROUNDS):
        # Swap only the first pair of each run of wrong pairs, so that no entry belongs to two swaps.
        follows = np.empty(wrong.size, bool)
        follows[:1] = False
        np.equal(wrong[1:], wrong[:-1] + 1, out=follows[1:])
        first = wrong[~follows]
        for x in (value, place):
            x[first], x[first + 1] = x[first + 1], x[first]
        # Now only neighbours of swapped pairs, and pairs that were not swapped, can be wrong.
        near = np.concatenate([wrong[follows], first - 1, first + 1])
        near = near[(near >= 0) & (near % length != length - 1)]
        wrong = near[value[near + 1] > value[near]]
        if wrong.size == 0:
            return True
        wrong = np.unique(wrong)
    return False


def _sort_wide(values: np.ndarray, scratch: Scratch) -> np.ndarray:
    """Returns the source of `sort_with_source`, computed with 64-bit keys."""
    keys = _keys(values, scratch)
    np.invert(keys, out=keys)
    both = scratch.wide[: values.size].reshape(values.shape)
    low, high = (0, 1) if sys.byteorder == "little" else (1, 0)
    halves = both.view(np.int32).reshape(*values.shape, 2)
    halves[..., high] = keys
    halves[..., low] = np.arange(values.shape[1])
    both.sort(axis=1)
    keys[...] = halves[..., low]
    return keys
