"""Sorts rows of floats in descending order with numpy, several times as fast as torch.

numpy's fast sort returns only values, not their positions. So the position becomes part of the sorted key.
The bits of a float sort like the float if those of negative numbers are inverted, except the sign. A 32-bit
key holds the upper bits of the value and, below them, the position. Values that differ only in their last
bits can end up in the wrong order. They are swapped afterwards. They are few: among 577 normally distributed
values, about five pairs have the same upper 22 bits. If there are many, the module uses 64-bit keys, which
hold the full value and position, at half the speed.
"""

import sys

import numpy as np
import torch

# Limits of `_repair`: wrong pairs of neighbours per entry, and rounds. Beyond them, 64-bit keys are used.
MOST = 1 / 16
ROUNDS = 48


class Scratch:
    """Holds the buffers of one thread, for samples of `entries` entries and blocks of `block` entries."""

    def __init__(self, entries: int, block: int) -> None:
        self.values = np.empty(entries, dtype=np.float32)
        self.ordered = np.empty(block, dtype=np.float32)
        self.narrow = np.empty(block, dtype=np.int32)
        self.wide = np.empty(block, dtype=np.int64)

    def places(self, source: np.ndarray) -> torch.Tensor:
        """Copies `source` to `self.wide` and returns it as an int64 tensor."""
        wide = self.wide[: source.size].reshape(source.shape)
        np.copyto(wide, source)
        return torch.from_numpy(wide)


def sort_values(values: np.ndarray, scratch: Scratch) -> np.ndarray:
    """Returns `values` (float32) with each row in descending order, in the memory of `scratch.narrow`."""
    keys = _keys(values, scratch)
    np.invert(keys, out=keys)
    keys.sort(axis=1)
    np.invert(keys, out=keys)
    return _mirror(keys, keys, values.view(np.int32)).view(np.float32)


def sort_with_source(values: np.ndarray, ordered: np.ndarray, scratch: Scratch) -> np.ndarray:
    """Sorts each row of `values` in descending order and writes it to `ordered`. Both are (D, L) float32.

    The sort is stable. The values must not contain -0. Returns int32 positions of shape (D, L), in the memory
    of `scratch.narrow`: ordered[d, k] = values[d, positions[d, k]].
    """
    source = _sort_narrow(values, ordered, scratch)
    if source is None:
        source = _sort_wide(values, scratch)
        take(values, scratch.places(source), ordered)
    return source


def _mirror(bits: np.ndarray, out: np.ndarray, scratch: np.ndarray) -> np.ndarray:
    """Writes int32 `bits` to `out`. Inverts all bits but the sign of negative numbers. Returns `out`."""
    np.right_shift(bits, 31, out=scratch)
    np.bitwise_and(scratch, 0x7FFFFFFF, out=scratch)
    return np.bitwise_xor(bits, scratch, out=out)


def _keys(values: np.ndarray, scratch: Scratch) -> np.ndarray:
    """Returns int32 keys that sort like the float32 `values`, in the memory of `scratch.narrow`."""
    keys = scratch.narrow[: values.size].reshape(values.shape)
    return _mirror(values.view(np.int32), keys, keys)


def take(values: np.ndarray, places: torch.Tensor, out: np.ndarray) -> None:
    """Sets out[d, k] = values[d, places[d, k]] for all entries. `places` comes from `Scratch.places`."""
    # torch gathers. numpy would first have to compute positions in the flattened matrix, which is slow.
    torch.gather(torch.from_numpy(values), 1, places, out=torch.from_numpy(out))


def put(values: np.ndarray, places: torch.Tensor, out: np.ndarray) -> None:
    """Sets out[d, places[d, k]] = values[d, k] for all entries. This is the inverse of `take`."""
    torch.from_numpy(out).scatter_(1, places, torch.from_numpy(values))


def _sort_narrow(values: np.ndarray, ordered: np.ndarray, scratch: Scratch) -> np.ndarray | None:
    """Computes `sort_with_source` with 32-bit keys. Returns None if the order needs too many repairs."""
    length = values.shape[1]
    low = (1 << (length - 1).bit_length()) - 1
    keys = _keys(values, scratch)
    # Invert the upper bits, so that an ascending sort puts the values in descending order. Keep the position.
    np.bitwise_or(keys, low, out=keys)
    np.bitwise_xor(keys, ~np.arange(length, dtype=np.int32), out=keys)
    keys.sort(axis=1)
    np.bitwise_and(keys, low, out=keys)
    take(values, scratch.places(keys), ordered)
    return keys if _repair(ordered, keys) else None


def _repair(ordered: np.ndarray, source: np.ndarray) -> bool:
    """Swaps neighbours in both arrays until all rows descend. Returns False if it reaches MOST or ROUNDS."""
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
    """Computes the positions that `sort_with_source` returns, with 64-bit keys."""
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
