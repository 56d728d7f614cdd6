"""Sorting rows of floats in descending order with numpy, whose vectorised sort is several times as fast as torch's.

numpy's fast sort returns values only, not their positions, so the position becomes part of the sorted key. A float's
bits, with negative numbers mirrored, sort like the float. A key of 32 bits holds the value's upper bits and the
position in the lower ones; it orders by value except for the last bits. Wrong neighbours are swapped afterwards.
They are few: of 577 normal values some five pairs agree in 22 bits. With many of them (values that hardly differ),
keys of 64 bits hold value and position in full, at half the speed.
"""

import sys

import numpy as np
import torch

# Limits of the repair by swaps, after which keys of 64 bits are used: wrong neighbours per entry, and rounds.
MOST = 1 / 16
ROUNDS = 48


class Scratch:
    """Memory that a thread uses again for each sample: allocating it anew would cost as much as the sort.

    entries: of the largest sample, block: of the largest block of its channels.
    """

    def __init__(self, entries: int, block: int) -> None:
        self.values = np.empty(entries, dtype=np.float32)
        self.ordered = np.empty(block, dtype=np.float32)
        self.narrow = np.empty(block, dtype=np.int32)
        self.wide = np.empty(block, dtype=np.int64)

    def places(self, source: np.ndarray) -> torch.Tensor:
        """source as int64, in the memory of wide."""
        wide = self.wide[: source.size].reshape(source.shape)
        np.copyto(wide, source)
        return torch.from_numpy(wide)


def sort_values(values: np.ndarray, scratch: Scratch) -> np.ndarray:
    """values (D, L) float32 in descending order along L, in the memory of scratch.narrow."""
    keys = _keys(values, scratch)
    np.invert(keys, out=keys)
    keys.sort(axis=1)
    np.invert(keys, out=keys)
    return _mirror(keys, keys, values.view(np.int32)).view(np.float32)


def sort_with_source(values: np.ndarray, ordered: np.ndarray, scratch: Scratch) -> np.ndarray:
    """Writes values (D, L) float32, without -0, in descending order of each row to ordered (D, L).

    Returns source (D, L) int32, in the memory of scratch.narrow: each value's former position in its row. The sort is
    stable.
    """
    source = _sort_narrow(values, ordered, scratch)
    if source is None:
        source = _sort_wide(values, scratch)
        take(values, scratch.places(source), ordered)
    return source


def _mirror(bits: np.ndarray, out: np.ndarray, scratch: np.ndarray) -> np.ndarray:
    """bits, int32, with all bits but the sign of negative ones flipped; its own inverse. out may be bits."""
    np.right_shift(bits, 31, out=scratch)
    np.bitwise_and(scratch, 0x7FFFFFFF, out=scratch)
    return np.bitwise_xor(bits, scratch, out=out)


def _keys(values: np.ndarray, scratch: Scratch) -> np.ndarray:
    """int32 whose ascending order is the ascending order of values (D, L), in the memory of scratch.narrow."""
    keys = scratch.narrow[: values.size].reshape(values.shape)
    return _mirror(values.view(np.int32), keys, keys)


def take(values: np.ndarray, places: torch.Tensor, out: np.ndarray) -> None:
    """out[d, k] = values[d, places[d, k]], all (D, L); places: `Scratch.places` of the source."""
    # By torch: numpy needs positions in the flat matrix, and computing those costs as much as the gathering.
    torch.gather(torch.from_numpy(values), 1, places, out=torch.from_numpy(out))


def put(values: np.ndarray, places: torch.Tensor, out: np.ndarray) -> None:
    """out[d, places[d, k]] = values[d, k]: the inverse of `take`."""
    torch.from_numpy(out).scatter_(1, places, torch.from_numpy(values))


def _sort_narrow(values: np.ndarray, ordered: np.ndarray, scratch: Scratch) -> np.ndarray | None:
    """As `sort_with_source`; None if too many values agree in the bits that fit beside the position."""
    length = values.shape[1]
    low = (1 << (length - 1).bit_length()) - 1
    keys = _keys(values, scratch)
    # Descending order is ascending order of the inverted value; the position is put in as it is.
    np.bitwise_or(keys, low, out=keys)
    np.bitwise_xor(keys, ~np.arange(length, dtype=np.int32), out=keys)
    keys.sort(axis=1)
    np.bitwise_and(keys, low, out=keys)
    take(values, scratch.places(keys), ordered)
    return keys if _repair(ordered, keys) else None


def _repair(ordered: np.ndarray, source: np.ndarray) -> bool:
    """Swaps neighbours within rows of ordered, and of source, until all rows descend; False if too many."""
    length = ordered.shape[1]
    wrong = np.flatnonzero(ordered[:, 1:] > ordered[:, :-1])
    if wrong.size == 0:
        return True
    if wrong.size > MOST * ordered.size:
        return False
    wrong += wrong // (length - 1)
    value, place = ordered.reshape(-1), source.reshape(-1)
    for _ in range(ROUNDS):
        # Only the first of each run of neighbours is swapped, so that no entry belongs to two swaps.
        follows = np.empty(wrong.size, bool)
        follows[:1] = False
        np.equal(wrong[1:], wrong[:-1] + 1, out=follows[1:])
        first = wrong[~follows]
        for x in (value, place):
            x[first], x[first + 1] = x[first + 1], x[first]
        # Now only the neighbours of swaps, and those not yet swapped, can be wrong.
        near = np.concatenate([wrong[follows], first - 1, first + 1])
        near = near[(near >= 0) & (near % length != length - 1)]
        wrong = near[value[near + 1] > value[near]]
        if wrong.size == 0:
            return True
        wrong = np.unique(wrong)
    return False


def _sort_wide(values: np.ndarray, scratch: Scratch) -> np.ndarray:
    """The source of `sort_with_source` by keys of 64 bits."""
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
