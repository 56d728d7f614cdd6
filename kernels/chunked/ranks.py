"""Computes the rank of each query's best positive by counting. Ties and NaN count against the model.

A matrix product may give equal candidates different similarities, because it can add up the last columns in
another order. So the matrix product decides only between similarities that differ by more than the rounding
error. `exact_products` decides between the few others. So ranks do not depend on the library, block sizes and
number of threads.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from d2s.kernels.chunked.common import DOT_ENTRIES, SamePairs, Sweep, full_precision
from d2s.kernels.chunked.exact import exact_error, exact_products
from d2s.kernels.dtypes import accumulator

# If at most one pair in SPARSE is undecided, float64 dot products of these pairs are tried first. Exact
# products decide all pairs that are left.
SPARSE = 64


def retrieval_ranks(
    queries: Tensor,
    candidates: Tensor,
    positives: tuple[Tensor, Tensor] | None,
    query_ids: Tensor | None,
    candidate_ids: Tensor | None,
) -> Tensor:
    """Implements `d2s.kernels.functional.retrieval_ranks`, which explains arguments and result."""
    dtype = accumulator(torch.promote_types(queries.dtype, candidates.dtype))
    mark = _marker(positives, query_ids, candidate_ids)
    ranks = torch.empty(queries.shape[0], dtype=torch.int64, device=queries.device)
    with full_precision(queries.device):
        rows, lengths = _moderate(queries.to(dtype).contiguous())
        columns, longest = _moderate(candidates.to(dtype).contiguous())
        rounding = Rounding(lengths, longest, rows.shape[1])
        for start, stop, s in Sweep(rows, columns):
            own = torch.zeros(s.shape, dtype=torch.bool, device=s.device)
            mark(own, start, stop)
            best = torch.where(own, s, -torch.inf).amax(1, keepdim=True)
            # An infinite or NaN `best` has no rounding error, so it is compared without tolerance.
            room = 2 * rounding.of(dtype, start, stop)
            below = s < torch.where(best.isfinite(), best - room, best)
            near = (s <= torch.where(best.isfinite(), best + room, torch.nan)) > below
            # Count all candidates that are not strictly below the best positive. Ties and NaN are included.
            ranks[start:stop] = s.shape[1] - (below | own).sum(1, dtype=torch.int32)
            unclear = _rows_with_any(near > own)
            if unclear.numel():
                part = rows[start:stop][unclear]
                room = 2 * rounding.of(torch.float64, start, stop)[unclear]
                ranks[start + unclear] -= _below(part, columns, near[unclear], own[unclear], room)
    return ranks


def _marker(
    positives: tuple[Tensor, Tensor] | None, query_ids: Tensor | None, candidate_ids: Tensor | None
) -> Callable[[Tensor, int, int], None]:
    """Returns a function (mask, start, stop) that sets mask[i, j] if j is a positive of row start + i."""
    if positives is None:
        same = SamePairs(query_ids, candidate_ids)
        return lambda mask, start, stop: same.fill(mask, start, stop, True)
    starts, indices = positives

    def mark(mask: Tensor, start: int, stop: int) -> None:
        count = starts[start + 1 : stop + 1] - starts[start:stop]
        rows = torch.repeat_interleave(torch.arange(stop - start, device=mask.device), count)
        mask[rows, indices[starts[start] : starts[stop]]] = True

    return mark


def _rows_with_any(x: Tensor) -> Tensor:
    """Returns the indices of the rows of the boolean matrix x that have a true entry."""
    # A CPU searches bytes 30 times as fast as bools.
    return x.view(torch.uint8).amax(1).nonzero().squeeze(1)


def _moderate(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns x and its row norms. First divides x by a power of two if products might overflow."""
    limit = 2.0**400 if x.dtype == torch.float64 else 2.0**40
    lengths = _lengths(x)
    if bool((lengths <= limit).all()):
        return x, lengths
    peak = torch.linalg.vector_norm(x, torch.inf, 1)
    peak = float(torch.where(peak.isfinite(), peak, 0).amax())
    down = math.frexp(limit)[1] - math.frexp(peak)[1]
    if down < 0:
        x = x * 2.0**down
        lengths = _lengths(x)
    return x, lengths


class Rounding:
    """Bounds the rounding errors of similarities, given the norms of rows and columns."""

    def __init__(self, lengths: Tensor, longest: Tensor, width: int) -> None:
        # `lengths` has the norms of the rows, (B,). `longest` has the norms of the columns, (N,).
        self.dtype, self.width, self.lengths = lengths.dtype, width, lengths
        self.shortened = lengths.dtype == torch.float32 and _shortens(lengths.device)
        # The similarities of a candidate with NaN or infinity have no rounding error.
        self.longest = torch.where(longest.isfinite(), longest, 0).amax()

    def of(self, dtype: torch.dtype, start: int, stop: int) -> Tensor:
        """Returns error bounds of products in `dtype` for rows start to stop, of shape (stop - start, 1).

        If a row is not finite, neither is its bound. A sum of D products q_i c_i has an error of at most
        D u / (1 - D u) |q| |c|, in any order (Higham, Accuracy and Stability, 3.1; u is the unit roundoff).
        Each product that underflows adds the smallest normal number. Eight more terms and the factor 2 cover
        the rounding of the bound itself. The bound is valid for D below a million.
        """
        units = (self.width + 8) * torch.finfo(dtype).eps / 2
        factor = units / (1 - 2 * units) + exact_error(self.width, self.dtype)
        if self.shortened and dtype == torch.float32:
            # Rounding both sides to bf16 adds 2^-8 each. tf32 has more bits and adds less.
            factor += 2.0**-6
        lengths = self.lengths[start:stop, None]
        floor = self.width * torch.finfo(self.dtype).tiny * (1 + lengths + self.longest)
        return factor * lengths * self.longest + floor


def _shortens(device: torch.device) -> bool:
    """Returns whether torch's settings allow lower precision, such as tf32, in float32 products."""
    backends = torch.backends
    own = backends.cuda if device.type == "cuda" else backends.mkldnn
    said = [getattr(x, "fp32_precision", "ieee") for x in (own.matmul, own, backends)]
    return any(x not in ("ieee", "none") for x in said)


def _lengths(x: Tensor) -> Tensor:
    """Returns an upper bound on the norm of each row of x. It holds even if squares underflow."""
    tiny = torch.finfo(x.dtype).tiny
    return torch.linalg.vector_norm(x, 2, 1) + math.sqrt(x.shape[1] * tiny)


def _below(rows: Tensor, columns: Tensor, near: Tensor, own: Tensor, room: Tensor) -> Tensor:
    """Returns how many undecided candidates of each row are below its best positive: (r,) int64.

    The boolean (r, N) masks `near` and `own` mark undecided candidates and positives. `room`, (r, 1), is
    twice the error bound of float64 products. The function overwrites `near`.
    """
    count = torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)
    if rows.dtype != torch.float64 and near.count_nonzero() * SPARSE <= near.numel():
        row, column = near.nonzero(as_tuple=True)
        s, positive = _dots(rows, columns, row, column), own[row, column]
        best = room.new_full((rows.shape[0],), -torch.inf, dtype=torch.float64)
        best = best.scatter_reduce_(0, row, torch.where(positive, s, -torch.inf), "amax")[row]
        width = room.squeeze(1)[row]
        below = s < best - width
        count.index_add_(0, row, (below > positive).to(torch.int64))
        near[row, column] = (s <= best + width) > below
    left = _rows_with_any(near > own)
    if left.numel():
        near, own = near[left], own[left]
        at = near.any(0).nonzero().squeeze(1)
        s, near, own = exact_products(rows[left], columns, at), near[:, at], own[:, at]
        best = torch.where(near & own, s, -torch.inf).amax(1, keepdim=True)
        count[left] += ((s < best) & (near > own)).sum(1)
    return count


def _dots(a: Tensor, b: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Returns the float64 dot product a[row[p]] . b[column[p]] for each index p."""
    out = torch.empty(row.shape[0], dtype=torch.float64, device=a.device)
    size = max(1, DOT_ENTRIES // a.shape[1])
    for start in range(0, row.shape[0], size):
        part = slice(start, start + size)
        torch.sum(a[row[part]].double() * b[column[part]], 1, out=out[part])
    return out
