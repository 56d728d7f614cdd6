"""What the sweeps over the similarity matrix share: precision, chunks of rows, same-image pairs, maxima."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor

from d2s.kernels.dtypes import accumulator

# torch does not need numpy, but with it a CPU sorts and searches faster.
HAS_NUMPY = find_spec("numpy") is not None
# Entries of one chunk of the similarity matrix: small enough to stay in a CPU's last cache level between the
# passes over it, large enough for the matrix product to run at its full rate.
CHUNK_ENTRIES = 1 << 22
MIN_ROWS = 32
# Entries of the rows that `row_dots` multiplies at once.
DOT_ENTRIES = 1 << 17
# Rows among which `column_maxima` searches at once.
BLOCK = 32


def upcast(x: Tensor) -> Tensor:
    """x (any shape), contiguous in its accumulator type; not copied if it is already."""
    return x.to(accumulator(x.dtype)).contiguous()


def full_precision(device: torch.device) -> AbstractContextManager:
    """A context in which autocast does not shorten matrix products."""
    # Making an autocast context takes ten times as long as asking whether one is needed.
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device_type=device.type, enabled=False)


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """The product of every row of a with the same row of b, both (n, D): (n,)."""
    # In parts: (n, D) products at once would leave holes in a CPU allocator's memory for the rest of the step.
    size = max(1, DOT_ENTRIES // max(1, a.shape[1])) if a.device.type == "cpu" else a.shape[0]
    out = a.new_empty(a.shape[0])
    for start in range(0, a.shape[0], size or 1):
        torch.sum(a[start : start + size] * b[start : start + size], 1, out=out[start : start + size])
    return out


class Sweep:
    """Chunks of rows of S = factor * rows @ columns^T, one after the other in one buffer.

    rows (B, D) and columns (N, D) come from `upcast`; the factor multiplies the finished product. The forward
    and the backward sweep of a loss use the same chunks, so their probabilities agree to the last bit.
    """

    def __init__(self, rows: Tensor, columns: Tensor, factor: float = 1.0) -> None:
        self.rows, self.columns, self.factor = rows, columns, factor
        n, m = rows.shape[0], columns.shape[0]
        # With enough rows a multiple of BLOCK, which `column_maxima` needs to be fast.
        self.size = max(1, min(n, max(MIN_ROWS, CHUNK_ENTRIES // m // BLOCK * BLOCK)))
        self.buffer = rows.new_empty(self.size, m)

    def __iter__(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yields (start, stop, S[start:stop]) with S (stop - start, N); the next step overwrites it."""
        for start in range(0, self.rows.shape[0], self.size):
            stop = min(start + self.size, self.rows.shape[0])
            s = self.buffer[: stop - start]
            torch.addmm(s, self.rows[start:stop], self.columns.t(), beta=0, alpha=self.factor, out=s)
            yield start, stop, s


class SamePairs:
    """The entries of the similarity matrix whose row and column have the same image id.

    row_ids (B,) and column_ids (N,) are int64. On a CPU the few such entries are listed from the sorted ids. On other
    devices a list would make the host wait, so all pairs of ids are compared.
    """

    def __init__(self, row_ids: Tensor, column_ids: Tensor) -> None:
        self.row_ids, self.column_ids = row_ids, column_ids
        self.listed = row_ids.device.type == "cpu"
        if self.listed:
            ordered, self.order = torch.sort(column_ids, stable=True)
            self.low = torch.searchsorted(ordered, row_ids)
            self.count = torch.searchsorted(ordered, row_ids, right=True) - self.low

    def entries(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """(row - start, column) of every same-image entry of rows start..stop, by row."""
        count = self.count[start:stop]
        rows = torch.repeat_interleave(torch.arange(stop - start), count)
        first = torch.cumsum(count, 0) - count
        within = torch.arange(rows.shape[0]) - first[rows]
        return rows, self.order[self.low[start:stop][rows] + within]

    def fill(self, s: Tensor, start: int, stop: int, value: float) -> None:
        """Writes value into the same-image entries of the chunk s (stop - start, N) of rows start..stop."""
        if self.listed:
            rows, columns = self.entries(start, stop)
            s[rows, columns] = value
        else:
            same = self.row_ids[start:stop, None] == self.column_ids
            s.masked_fill_(same, value)


def positive_entries(s: Tensor, start: int, offset: int) -> Tensor:
    """A view (rows,) of the chunk's positive pairs: row i with column offset + i."""
    return s[:, start + offset :].diagonal()


def row_maxima(s: Tensor) -> tuple[Tensor, Tensor]:
    """(value, index) of the first largest entry of every row of s (r, N), (r,) each."""
    if s.device.type != "cpu" or not HAS_NUMPY:
        return s.max(1)
    # numpy's search is vectorised and torch's is not: 0.4 against 3.6 ms for 512 x 8192 float32.
    at = torch.from_numpy(s.numpy().argmax(1))
    return s.gather(1, at[:, None]).squeeze(1), at


def column_maxima(s: Tensor) -> tuple[Tensor, Tensor]:
    """(value, index) of the first largest entry of every column of s (r, N), (N,) each."""
    r, m = s.shape
    if s.device.type != "cpu" or r % BLOCK:
        return s.max(0)
    # A CPU reduces columns fast but searches them slowly (0.5 against 10 ms for 256 x 8192). So reduce blocks
    # of rows, find the block with the maximum, and search in that block alone.
    blocks = s.view(r // BLOCK, BLOCK, m)
    best, block = blocks.amax(1).max(0)
    within = blocks[block, :, torch.arange(m)]
    return best, block * BLOCK + row_maxima(within)[1]
