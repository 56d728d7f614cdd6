"""Helpers for sweeps over the similarity matrix: precision, chunks of rows, same-image pairs, maxima."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor

from d2s.kernels.dtypes import accumulator

# numpy is optional. With numpy, a CPU sorts and searches faster.
HAS_NUMPY = find_spec("numpy") is not None
# Entries in one chunk of the similarity matrix. A chunk is small enough to stay in a CPU's last cache level
# between passes. It is large enough for the matrix product to run at full speed.
CHUNK_ENTRIES = 1 << 22
# The least number of rows in a chunk, even if the chunk then has more than CHUNK_ENTRIES entries.
MIN_ROWS = 32
# Entries that `row_dots` multiplies at once.
DOT_ENTRIES = 1 << 17
# Rows in a block that `column_maxima` reduces at once.
BLOCK = 32


def upcast(x: Tensor) -> Tensor:
    """Returns x, contiguous and in the type `accumulator(x.dtype)`. Copies only if necessary."""
    return x.to(accumulator(x.dtype)).contiguous()


def full_precision(device: torch.device) -> AbstractContextManager:
    """Returns a context in which autocast does not lower the precision of matrix products."""
    # Entering an autocast context takes ten times as long as this check.
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device_type=device.type, enabled=False)


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """Returns the dot product a[i] . b[i] for each row i. a and b have shape (n, D), the result (n,)."""
    # On a CPU, multiply a few rows at a time. A buffer for all n x D products would fragment memory.
    size = max(1, DOT_ENTRIES // max(1, a.shape[1])) if a.device.type == "cpu" else a.shape[0]
    out = a.new_empty(a.shape[0])
    for start in range(0, a.shape[0], size or 1):
        torch.sum(a[start : start + size] * b[start : start + size], 1, out=out[start : start + size])
    return out


class Sweep:
    """Computes S = factor * rows @ columns^T, one chunk of rows at a time, in one buffer for all chunks.

    `rows`, of shape (B, D), and `columns`, of shape (N, D), come from `upcast`. `factor` multiplies the
    finished product. The forward and the backward of a loss use the same chunks. So both compute exactly the
    same probabilities.
    """

    def __init__(self, rows: Tensor, columns: Tensor, factor: float = 1.0) -> None:
        self.rows, self.columns, self.factor = rows, columns, factor
        n, m = rows.shape[0], columns.shape[0]
        # If there are enough rows, the size is a multiple of BLOCK, which makes `column_maxima` fast.
        self.size = max(1, min(n, max(MIN_ROWS, CHUNK_ENTRIES // m // BLOCK * BLOCK)))
        self.buffer = rows.new_empty(self.size, m)

    def __iter__(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yields (start, stop, chunk). The chunk is S[start:stop], which the next iteration overwrites."""
        for start in range(0, self.rows.shape[0], self.size):
            stop = min(start + self.size, self.rows.shape[0])
            s = self.buffer[: stop - start]
            torch.addmm(s, self.rows[start:stop], self.columns.t(), beta=0, alpha=self.factor, out=s)
            yield start, stop, s


class SamePairs:
    """Finds the entries of the similarity matrix whose row and column have the same image id.

    The int64 ids have the shapes (B,) for `row_ids` and (N,) for `column_ids`. On a CPU, the class sorts the
    ids and lists the few such entries. On other devices, making a list would force the host to wait. There,
    the class compares all pairs of ids.
    """

    def __init__(self, row_ids: Tensor, column_ids: Tensor) -> None:
        self.row_ids, self.column_ids = row_ids, column_ids
        self.listed = row_ids.device.type == "cpu"
        if self.listed:
            ordered, self.order = torch.sort(column_ids, stable=True)
            self.low = torch.searchsorted(ordered, row_ids)
            self.count = torch.searchsorted(ordered, row_ids, right=True) - self.low

    def entries(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Returns the indices (row - start, column) of the same-image entries in S[start:stop], by row."""
        count = self.count[start:stop]
        rows = torch.repeat_interleave(torch.arange(stop - start), count)
        first = torch.cumsum(count, 0) - count
        within = torch.arange(rows.shape[0]) - first[rows]
        return rows, self.order[self.low[start:stop][rows] + within]

    def fill(self, s: Tensor, start: int, stop: int, value: float) -> None:
        """Writes `value` into all same-image entries of the chunk `s` = S[start:stop], in place."""
        if self.listed:
            rows, columns = self.entries(start, stop)
            s[rows, columns] = value
        else:
            same = self.row_ids[start:stop, None] == self.column_ids
            s.masked_fill_(same, value)


def positive_entries(s: Tensor, start: int, offset: int) -> Tensor:
    """Returns a view of the positives of the chunk `s`, one per row. The chunk begins at row `start` of S."""
    return s[:, start + offset :].diagonal()


def row_maxima(s: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the largest entry of each row of s, and its column. In a tie, the first column is returned."""
    if s.device.type != "cpu" or not HAS_NUMPY:
        return s.max(1)
    # numpy's search is vectorised, unlike torch's: it takes 0.4 ms, not 3.6 ms, for 512 x 8192 float32.
    at = torch.from_numpy(s.numpy().argmax(1))
    return s.gather(1, at[:, None]).squeeze(1), at


def column_maxima(s: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the largest entry of each column of s, and its row. In a tie, the first row is returned."""
    r, m = s.shape
    if s.device.type != "cpu" or r % BLOCK:
        return s.max(0)
    # On a CPU, the maximum of each column is fast (0.5 ms for 256 x 8192), but its position is slow (10 ms).
    # So compute the maxima of blocks of rows, find the block with the largest, and search only this block.
    blocks = s.view(r // BLOCK, BLOCK, m)
    best, block = blocks.amax(1).max(0)
    within = blocks[block, :, torch.arange(m)]
    return best, block * BLOCK + row_maxima(within)[1]
