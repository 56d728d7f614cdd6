"""Helpers for sweeps over the similarity matrix: precision, chunks of rows, same-image pairs, maxima."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor

from d2s.kernels.dtypes import accumulator

# numpy is optional; with it, a CPU sorts and searches faster.
HAS_NUMPY = find_spec("numpy") is not None
# Entries in one chunk of the similarity matrix. A chunk is small enough to stay in a CPU's last cache level
# between passes, and large enough for the matrix product to run at full speed.
CHUNK_ENTRIES = 1 << 22
MIN_ROWS = 32
# Entries that `row_dots` multiplies at once.
DOT_ENTRIES = 1 << 17
# Rows in a block that `column_maxima` reduces at once.
BLOCK = 32


def upcast(x: Tensor) -> Tensor:
    """Returns x (any shape), contiguous and in its accumulator type; copies only if necessary."""
    return x.to(accumulator(x.dtype)).contiguous()


def full_precision(device: torch.device) -> AbstractContextManager:
    """Returns a context in which autocast does not lower the precision of matrix products."""
    # Entering an autocast context takes ten times as long as this check.
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device_type=device.type, enabled=False)


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """Returns the dot product of each row of a (n, D) with the same row of b (n, D): (n,)."""
    # A few rows at a time: all (n, D) products at once would fragment a CPU allocator's memory.
    size = max(1, DOT_ENTRIES // max(1, a.shape[1])) if a.device.type == "cpu" else a.shape[0]
    out = a.new_empty(a.shape[0])
    for start in range(0, a.shape[0], size or 1):
        torch.sum(a[start : start + size] * b[start : start + size], 1, out=out[start : start + size])
    return out


class Sweep:
    """Iterates over S = factor * rows @ columns^T, one chunk of rows at a time, in one buffer.

    `rows` (B, D) and `columns` (N, D) come from `upcast`. `factor` multiplies the finished product. The
    forward and the backward of a loss use the same chunks, so both compute exactly the same probabilities.
    """

    def __init__(self, rows: Tensor, columns: Tensor, factor: float = 1.0) -> None:
        self.rows, self.columns, self.factor = rows, columns, factor
        n, m = rows.shape[0], columns.shape[0]
        # If there are enough rows, the size is a multiple of BLOCK, which makes `column_maxima` fast.
        self.size = max(1, min(n, max(MIN_ROWS, CHUNK_ENTRIES // m // BLOCK * BLOCK)))
        self.buffer = rows.new_empty(self.size, m)

    def __iter__(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yields (start, stop, chunk): rows start..stop of S. The next chunk overwrites this one."""
        for start in range(0, self.rows.shape[0], self.size):
            stop = min(start + self.size, self.rows.shape[0])
            s = self.buffer[: stop - start]
            torch.addmm(s, self.rows[start:stop], self.columns.t(), beta=0, alpha=self.factor, out=s)
            yield start, stop, s


class SamePairs:
    """Finds the entries of the similarity matrix whose row and column have the same image id.

    The int64 ids are row_ids (B,) and column_ids (N,). A CPU lists the few such entries by sorting the ids.
    On other devices the host would wait for a list, so all pairs of ids are compared.
    """

    def __init__(self, row_ids: Tensor, column_ids: Tensor) -> None:
        self.row_ids, self.column_ids = row_ids, column_ids
        self.listed = row_ids.device.type == "cpu"
        if self.listed:
            ordered, self.order = torch.sort(column_ids, stable=True)
            self.low = torch.searchsorted(ordered, row_ids)
            self.count = torch.searchsorted(ordered, row_ids, right=True) - self.low

    def entries(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Returns (row - start, column) of every same-image entry in rows start..stop, ordered by row."""
        count = self.count[start:stop]
        rows = torch.repeat_interleave(torch.arange(stop - start), count)
        first = torch.cumsum(count, 0) - count
        within = torch.arange(rows.shape[0]) - first[rows]
        return rows, self.order[self.low[start:stop][rows] + within]

    def fill(self, s: Tensor, start: int, stop: int, value: float) -> None:
        """Writes the value into the same-image entries of the chunk s (stop - start, N)."""
        if self.listed:
            rows, columns = self.entries(start, stop)
            s[rows, columns] = value
        else:
            same = self.row_ids[start:stop, None] == self.column_ids
            s.masked_fill_(same, value)


def positive_entries(s: Tensor, start: int, offset: int) -> Tensor:
    """Returns a view (rows,) of a chunk's positive pairs; the positive of row i is column offset + i."""
    return s[:, start + offset :].diagonal()


def row_maxima(s: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (value, index), each (r,), of the largest entry in each row of s; the first in a tie."""
    if s.device.type != "cpu" or not HAS_NUMPY:
        return s.max(1)
    # numpy's search is vectorised, torch's is not: 0.4 ms against 3.6 ms for 512 x 8192 float32.
    at = torch.from_numpy(s.numpy().argmax(1))
    return s.gather(1, at[:, None]).squeeze(1), at


def column_maxima(s: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (value, index), each (N,), of the largest entry in each column of s; the first in a tie."""
    r, m = s.shape
    if s.device.type != "cpu" or r % BLOCK:
        return s.max(0)
    # A CPU reduces columns fast but searches them slowly (0.5 ms against 10 ms for 256 x 8192). So this
    # reduces blocks of rows, finds the block with the maximum, and searches only that block.
    blocks = s.view(r // BLOCK, BLOCK, m)
    best, block = blocks.amax(1).max(0)
    within = blocks[block, :, torch.arange(m)]
    return best, block * BLOCK + row_maxima(within)[1]
