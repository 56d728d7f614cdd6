"""Computes the order of n samples as a pure function of (n, seed, epoch).

Nothing is stored, and the number of workers does not matter. A keyed bijection of 0..n-1 replaces a shuffled
list. So an order of hundreds of millions of items needs no memory. The item at any position can be computed
alone. The bijection is a Feistel network on a grid of a x b cells. a and b are near the square root of n. Each
round adds a keyed hash of one coordinate to the other coordinate. The grid has up to a - 1 cells more than n.
Cycle walking skips these cells (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
"""

from collections.abc import Sequence
from math import isqrt

import numpy as np
from numpy.typing import NDArray

from d2s.shards.order import draws

I64 = NDArray[np.int64]
_ROUNDS = 8


class Permutation:
    """A bijection of 0..n-1 that depends on `seed`, `epoch` and `part`. Raises ValueError if `n` is less than 1.

    Args:
        n: number of items, at least 1.
        seed: the seed of the training run.
        epoch: the epoch, counted from 0.
        part: selects one of several permutations of an epoch.
    """

    def __init__(self, n: int, seed: int, epoch: int, part: int = 0) -> None:
        if n < 1:
            raise ValueError(f"n is {n}: an order needs at least one item")
        self.n = n
        wide = isqrt(n - 1) + 1
        self._a = np.uint64(wide)
        self._b = np.uint64(-(-n // wide))
        self._keys = draws.bits(seed, epoch, [part], "order", _ROUNDS)[0]

    def __len__(self) -> int:
        return self.n

    def __call__(self, positions: I64) -> I64:
        """Returns the items at `positions`. Both are int64 arrays of one shape (k,), with entries in 0..n-1."""
        items = np.array(positions, np.uint64, ndmin=1)
        assert items.size == 0 or items.max() < self.n, "position beyond the order"
        items = self._encipher(items)
        # A cell of n or more is enciphered again until the result is below n. This is still a bijection.
        while (outside := np.flatnonzero(items >= self.n)).size:
            items[outside] = self._encipher(items[outside])
        return items.astype(np.int64)

    def _encipher(self, cells: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = cells // self._b, cells % self._b
        for number, key in enumerate(self._keys):
            if number % 2 == 0:
                left = (left + draws.mix(right + key) % self._a) % self._a
            else:
                right = (right + draws.mix(left + key) % self._b) % self._b
        return left * self._b + right


class BlockPermutation:
    """An order of items for disks with slow random reads. Shuffles the shards, then the items in each block.

    A block has `block` consecutive shards of the shuffled order. The last block may have fewer. The items of a
    block have consecutive positions. So a reader needs the shards of at most two neighbouring blocks at a time.
    The memory is proportional to the number of shards.

    Args:
        shard_sizes: number of items in each shard, 0 or more. Items are numbered in the order of the shards.
        seed, epoch: as in `Permutation`.
        block: number of shards in a block, at least 1.
    Raises:
        ValueError: there are no items, or `block` is less than 1.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, epoch: int, block: int) -> None:
        if block < 1:
            raise ValueError(f"block_shards is {block}: use at least 1")
        sizes = np.asarray(shard_sizes, np.int64)
        self.n = int(sizes.sum())
        if self.n < 1:
            raise ValueError("shard_sizes holds no item: an order needs at least one")
        self._seed, self._epoch = seed, epoch
        shuffled = Permutation(len(sizes), seed, epoch, part=-1)(np.arange(len(sizes)))
        self._first = (np.cumsum(sizes) - sizes)[shuffled]  # number of the first item in each shuffled shard
        self._ends = np.cumsum(sizes[shuffled])  # position after the last item of each shuffled shard
        self._block_ends = np.append(self._ends[block - 1 :: block], self.n)
        if len(sizes) % block == 0:
            self._block_ends = self._block_ends[:-1]

    def __len__(self) -> int:
        return self.n

    def __call__(self, positions: I64) -> I64:
        """Returns the items at `positions`. Both are int64 arrays of one shape (k,), with entries in 0..n-1."""
        positions = np.array(positions, np.int64, ndmin=1)
        assert positions.size == 0 or positions.max() < self.n, "position beyond the order"
        mixed = np.empty_like(positions)
        blocks = np.searchsorted(self._block_ends, positions, side="right")
        for block in np.unique(blocks):
            here = blocks == block
            start = int(self._block_ends[block - 1]) if block else 0
            inside = Permutation(int(self._block_ends[block]) - start, self._seed, self._epoch, int(block))
            mixed[here] = start + inside(positions[here] - start)
        shard = np.searchsorted(self._ends, mixed, side="right")
        begins = np.where(shard > 0, self._ends[shard - 1], 0)
        return self._first[shard] + mixed - begins


def batch_positions(step: int, global_batch: int, rank: int = 0, world: int = 1) -> range:
    """Returns the positions that worker `rank` of `world` reads for global batch `step` of an epoch.

    With B = `global_batch` / `world`, worker r takes rows r*B to (r+1)*B - 1 of the batch. Raises ValueError if
    the batch cannot be divided equally. `step` counts the training steps of the epoch from 0.
    """
    if global_batch % world:
        raise ValueError(
            f"batch_size is {global_batch}, which {world} workers cannot share equally: use a multiple of {world}"
        )
    local = global_batch // world
    start = step * global_batch + rank * local
    return range(start, start + local)


def steps_per_epoch(n: int, global_batch: int) -> int:
    """Returns the number of full global batches in `n` items. An incomplete last batch does not count.

    Raises ValueError if `n` items do not fill one batch.
    """
    if global_batch < 1:
        raise ValueError(f"batch_size is {global_batch}: use at least 1")
    if n < global_batch:
        raise ValueError(
            f"batch_size is {global_batch} but the split has {n} items: use a batch of at most {n}"
        )
    return n // global_batch
