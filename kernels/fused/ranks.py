"""Computes retrieval ranks: finds each query's best positive, then counts the candidates not below it.

rank_i = number of candidates j that are not positives of i and for which S_ij < best_i is false.

Two sweeps compute tiles by the same arithmetic. So a candidate equal to the best positive ties with it
exactly. The first sweep computes few tiles. If positives are listed, it gathers COLUMNS positives per tile.
If positives are given by ids, it computes only tiles with a positive. The results take 8 bytes per query and
range of columns. If a positive's similarity is NaN, no candidate is below the best, and all others count.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2s.kernels.fused.launch import INTERPRETED, PROGRAMS, cdiv, on_device_of, options, tile_constants
from d2s.kernels.fused.spec import KernelSpec
from d2s.kernels.fused.sweep import resident_rows, similarities
from d2s.kernels.fused.tiles import tile_for

SIZES = ("n", "m", "tiles")


@triton.jit
def _better(best, broken, s, own):
    """Updates each row's best positive and whether a positive is NaN. `own` marks the positives in `s`."""
    broken = broken | (tl.max((own & (s != s)).to(tl.int32), 1) > 0)
    return tl.maximum(best, tl.max(tl.where(own & (s == s), s, float("-inf")), 1)), broken


@triton.jit(do_not_specialize=("n",))
def _best_listed(
    queries,  # (B, D)
    candidates,  # (N, D)
    starts,  # (B + 1,)
    indices,  # (positives of all queries,)
    best,  # (B,), -inf without positives
    n,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Computes best[i], the largest similarity of query i with its positives, listed in `indices`."""
    block = tl.program_id(0)
    row = block * ROWS + tl.arange(0, ROWS)
    inner_row = tl.minimum(row, n - 1)
    first, last = tl.load(starts + inner_row), tl.load(starts + inner_row + 1)
    resident = resident_rows(queries, inner_row, WIDTH, DEPTH, UPCAST)
    value = tl.full((ROWS,), float("-inf"), tl.float32)
    broken = tl.zeros((ROWS,), tl.int32) > 0
    # The lists of neighbouring queries follow each other.
    stop = tl.load(starts + tl.minimum((block + 1) * ROWS, n))
    for start in range(tl.load(starts + block * ROWS), stop, COLUMNS):
        entry = start + tl.arange(0, COLUMNS)
        column = tl.load(indices + tl.minimum(entry, stop - 1))
        s = similarities(resident, queries, inner_row, candidates, column, WIDTH, DEPTH, UPCAST)
        own = (first[:, None] <= entry[None, :]) & (entry[None, :] < last[:, None])
        value, broken = _better(value, broken, s, own)
    tl.store(best + row, tl.where(broken, float("nan"), value), mask=row < n)


@triton.jit(do_not_specialize=SIZES)
def _best_by_id(
    queries,  # (B, D)
    candidates,  # (N, D)
    query_ids,  # (B,)
    candidate_ids,  # (N,)
    best,  # (splits, B), -inf without positives
    n, m, tiles,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Computes best[k, i], the largest similarity of query i with positives in column range k."""
    split = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inner_row = tl.minimum(row, n - 1)
    row_id = tl.load(query_ids + inner_row)
    resident = resident_rows(queries, inner_row, WIDTH, DEPTH, UPCAST)
    value = tl.full((ROWS,), float("-inf"), tl.float32)
    broken = tl.zeros((ROWS,), tl.int32) > 0
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(m, COLUMNS))):
        column = tile * COLUMNS + tl.arange(0, COLUMNS)
        inner = tl.minimum(column, m - 1)
        own = row_id[:, None] == tl.load(candidate_ids + inner)[None, :]
        if tl.max(tl.max(own.to(tl.int32), 1), 0) > 0:
            # Columns beyond the last column repeat it, which changes no maximum.
            s = similarities(resident, queries, inner_row, candidates, inner, WIDTH, DEPTH, UPCAST)
            # Compare the ids again, because keeping the mask would take more registers.
            own = row_id[:, None] == tl.load(candidate_ids + inner)[None, :]
            value, broken = _better(value, broken, s, own)
    to = best + split.to(tl.int64) * n + row
    tl.store(to, tl.where(broken, float("nan"), value), mask=row < n)


@triton.jit(do_not_specialize=SIZES)
def _count(
    queries,  # (B, D)
    candidates,  # (N, D)
    best,  # (B,)
    query_ids,  # (B,)
    candidate_ids,  # (N,)
    starts,  # (B + 1,)
    indices,  # (positives of all queries,)
    counts,  # (splits, B)
    n, m, tiles,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, LISTED: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Sets counts[k, i]: how many candidates of range k are neither positives of query i nor < best[i]."""
    split = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inner_row = tl.minimum(row, n - 1)
    threshold = tl.load(best + inner_row)
    resident = resident_rows(queries, inner_row, WIDTH, DEPTH, UPCAST)
    if LISTED:
        first = tl.load(starts + inner_row)
        listed = (tl.load(starts + inner_row + 1) - first).to(tl.int32)
        most = tl.max(listed, 0)
    else:
        row_id = tl.load(query_ids + inner_row)
    count = tl.zeros((ROWS,), tl.int32)
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(m, COLUMNS))):
        column = tile * COLUMNS + tl.arange(0, COLUMNS)
        inner = tl.minimum(column, m - 1)
        s = similarities(resident, queries, inner_row, candidates, inner, WIDTH, DEPTH, UPCAST)
        other = (column < m)[None, :] & ~(s < threshold[:, None])
        if LISTED:
            for i in range(0, most):
                at = tl.load(indices + first + i, mask=i < listed, other=-1)
                other = other & (at.to(tl.int32)[:, None] != column[None, :])
        else:
            other = other & (row_id[:, None] != tl.load(candidate_ids + inner)[None, :])
        count += tl.sum(other.to(tl.int32), 1)
    tl.store(counts + split.to(tl.int64) * n + row, count, mask=row < n)


def retrieval_ranks(
    queries: Tensor,
    candidates: Tensor,
    positives: tuple[Tensor, Tensor] | None,
    query_ids: Tensor | None,
    candidate_ids: Tensor | None,
) -> Tensor:
    """Returns int64 ranks of shape (B,). See `d2s.kernels.functional.retrieval_ranks`."""
    dtype = torch.promote_types(queries.dtype, candidates.dtype)
    dtype = torch.float32 if dtype == torch.float64 else dtype
    queries, candidates = queries.to(dtype).contiguous(), candidates.to(dtype).contiguous()
    (n, width), m = queries.shape, candidates.shape[0]
    # Both sweeps must use the same tile, because another tile could add up in another order.
    tile = tile_for("ranks_count", queries)
    upcast = INTERPRETED and queries.element_size() == 2
    constants = tile_constants(tile, width, upcast) | options(tile)
    blocks, columns = cdiv(n, tile.rows), cdiv(m, tile.columns)
    tiles = cdiv(columns, min(columns, max(1, PROGRAMS // blocks)))
    splits = cdiv(columns, tiles)
    counts = queries.new_empty(splits, n, dtype=torch.int32)
    with on_device_of(queries):
        if positives is not None:
            starts, indices = (x.contiguous() for x in positives)
            best = queries.new_empty(n, dtype=torch.float32)
            _best_listed[(blocks,)](queries, candidates, starts, indices, best, n, **constants)
            # `_count` also takes pointers to ids, but does not read them. Any tensor will do.
            ids = starts, starts
        else:
            ids = query_ids.contiguous(), candidate_ids.contiguous()
            starts, indices = ids
            best = queries.new_empty(splits, n, dtype=torch.float32)
            _best_by_id[blocks, splits](queries, candidates, *ids, best, n, m, tiles, **constants)
            # Unlike the maximum in Triton, torch's keeps NaN.
            best = best.amax(0)
        _count[blocks, splits](
            queries, candidates, best, *ids, starts, indices, counts, n, m, tiles,
            LISTED=positives is not None, **constants,
        )  # fmt: skip
    return counts.sum(0)


def _spec(name: str, kernel: object, pointers: dict[str, str], **fixed: bool) -> KernelSpec:
    return KernelSpec(
        name=name,
        row="ranks_count",
        kernel=kernel,
        pointers={"queries": "*x", "candidates": "*x", "best": "*fp32", **pointers},
        constants=lambda tile, width, half: {**tile_constants(tile, width), **fixed},
    )


_IDS = dict.fromkeys(("query_ids", "candidate_ids"), "*i64")
_LISTS = dict.fromkeys(("starts", "indices"), "*i64")
_BOTH = {**_IDS, **_LISTS, "counts": "*i32"}
SPECS = [
    _spec("ranks_best_listed", _best_listed, _LISTS),
    _spec("ranks_best_by_id", _best_by_id, _IDS),
    _spec("ranks_count", _count, _BOTH, LISTED=False),
    _spec("ranks_count_listed", _count, _BOTH, LISTED=True),
]
