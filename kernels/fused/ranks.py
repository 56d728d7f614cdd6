"""Retrieval ranks by counting: the best positive of each query, then how many others are not below it.

Both sweeps make their tiles by the same arithmetic, so that a candidate equal to the best positive ties with it
to the last bit. The first one makes few: listed positives are gathered, a tile for every COLUMNS of them, and
of the ids' tiles only those are made that hold a positive. Memory: 8 bytes a query and range of columns.
A best positive that is no number is none, and nothing is below that: every other candidate counts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2s.kernels.fused.launch import INTERPRETED, PROGRAMS, cdiv, on, options
from d2s.kernels.fused.spec import KernelSpec
from d2s.kernels.fused.sweep import kept_rows, similarities
from d2s.kernels.fused.tiles import Tile, tile_for

SIZES = ("n", "m", "tiles")


@triton.jit
def _better(best, broken, s, own):
    """The best positive so far (r,), and whether one of them was no number; own (r, c): where s is a positive's."""
    broken = broken | (tl.max((own & (s != s)).to(tl.int32), 1) > 0)
    return tl.maximum(best, tl.max(tl.where(own & (s == s), s, float("-inf")), 1)), broken


@triton.jit(do_not_specialize=("n",))
def _best_listed(
    queries,
    candidates,
    starts,
    indices,
    best,
    n,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """best (n,): the largest similarity of query i among indices[starts[i] : starts[i + 1]]; -inf without any."""
    block = tl.program_id(0)
    row = block * ROWS + tl.arange(0, ROWS)
    inner_row = tl.minimum(row, n - 1)
    first, last = tl.load(starts + inner_row), tl.load(starts + inner_row + 1)
    kept = kept_rows(queries, inner_row, WIDTH, DEPTH, UPCAST)
    value = tl.full((ROWS,), float("-inf"), tl.float32)
    broken = tl.zeros((ROWS,), tl.int32) > 0
    # The lists of a block of queries follow each other.
    stop = tl.load(starts + tl.minimum((block + 1) * ROWS, n))
    for start in range(tl.load(starts + block * ROWS), stop, COLUMNS):
        entry = start + tl.arange(0, COLUMNS)
        column = tl.load(indices + tl.minimum(entry, stop - 1))
        s = similarities(kept, queries, inner_row, candidates, column, WIDTH, DEPTH, UPCAST)
        own = (first[:, None] <= entry[None, :]) & (entry[None, :] < last[:, None])
        value, broken = _better(value, broken, s, own)
    tl.store(best + row, tl.where(broken, float("nan"), value), mask=row < n)


@triton.jit(do_not_specialize=SIZES)
def _best_by_id(
    queries,
    candidates,
    query_ids,
    candidate_ids,
    best,
    n,
    m,
    tiles,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """best (splits, n): the largest similarity of query i among the candidates of its id, per range."""
    split = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inner_row = tl.minimum(row, n - 1)
    row_id = tl.load(query_ids + inner_row)
    kept = kept_rows(queries, inner_row, WIDTH, DEPTH, UPCAST)
    value = tl.full((ROWS,), float("-inf"), tl.float32)
    broken = tl.zeros((ROWS,), tl.int32) > 0
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(m, COLUMNS))):
        column = tile * COLUMNS + tl.arange(0, COLUMNS)
        inner = tl.minimum(column, m - 1)
        own = row_id[:, None] == tl.load(candidate_ids + inner)[None, :]
        if tl.max(tl.max(own.to(tl.int32), 1), 0) > 0:
            # A column behind the last repeats it, which changes no maximum.
            s = similarities(kept, queries, inner_row, candidates, inner, WIDTH, DEPTH, UPCAST)
            # Compared once more: the mask would take more registers than the ids do.
            own = row_id[:, None] == tl.load(candidate_ids + inner)[None, :]
            value, broken = _better(value, broken, s, own)
    to = best + split.to(tl.int64) * n + row
    tl.store(to, tl.where(broken, float("nan"), value), mask=row < n)


@triton.jit(do_not_specialize=SIZES)
def _count(
    queries,
    candidates,
    best,
    query_ids,
    candidate_ids,
    starts,
    indices,
    counts,
    n,
    m,
    tiles,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    LISTED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """counts (splits, n): the candidates of a range that are no positives of query i and not below best (n,)."""
    split = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inner_row = tl.minimum(row, n - 1)
    threshold = tl.load(best + inner_row)
    kept = kept_rows(queries, inner_row, WIDTH, DEPTH, UPCAST)
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
        s = similarities(kept, queries, inner_row, candidates, inner, WIDTH, DEPTH, UPCAST)
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
    """(n,) int64; see `d2s.kernels.functional.retrieval_ranks`."""
    dtype = torch.promote_types(queries.dtype, candidates.dtype)
    dtype = torch.float32 if dtype == torch.float64 else dtype
    queries, candidates = queries.to(dtype).contiguous(), candidates.to(dtype).contiguous()
    n, m = queries.shape[0], candidates.shape[0]
    # One tile for both sweeps: another one could add up in another order.
    tile = tile_for("ranks_count", queries)
    constants = _constants(tile, queries.shape[1], INTERPRETED and queries.element_size() == 2) | options(
        tile
    )
    blocks, columns = cdiv(n, tile.rows), cdiv(m, tile.columns)
    tiles = cdiv(columns, min(columns, max(1, PROGRAMS // blocks)))
    splits = cdiv(columns, tiles)
    counts = queries.new_empty(splits, n, dtype=torch.int32)
    with on(queries):
        if positives is not None:
            starts, indices = (x.contiguous() for x in positives)
            best = queries.new_empty(n, dtype=torch.float32)
            _best_listed[(blocks,)](queries, candidates, starts, indices, best, n, **constants)
            ids = starts, starts
        else:
            ids = query_ids.contiguous(), candidate_ids.contiguous()
            starts, indices = ids
            best = queries.new_empty(splits, n, dtype=torch.float32)
            _best_by_id[blocks, splits](queries, candidates, *ids, best, n, m, tiles, **constants)
            # Of all ranges; what is no number stays so.
            best = best.amax(0)
        _count[blocks, splits](
            queries, candidates, best, *ids, starts, indices, counts, n, m, tiles,
            LISTED=positives is not None, **constants,
        )  # fmt: skip
    return counts.sum(0)


def _constants(tile: Tile, width: int, upcast: bool) -> dict[str, object]:
    return {
        "WIDTH": width,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": tile.depth,
        "UPCAST": upcast,
    }


def _specs() -> list[KernelSpec]:
    sides = {"queries": "*x", "candidates": "*x", "best": "*fp32"}
    ids = dict.fromkeys(("query_ids", "candidate_ids"), "*i64")
    lists = dict.fromkeys(("starts", "indices"), "*i64")

    def spec(name: str, kernel: object, pointers: dict, sizes: tuple, **fixed: bool) -> KernelSpec:
        return KernelSpec(
            name=name,
            row="ranks_count",
            kernel=kernel,
            pointers=pointers,
            scalars=dict.fromkeys(sizes, "i32"),
            constants=lambda tile, width, half: {**_constants(tile, width, False), **fixed},
            unaligned=frozenset(sizes),
        )

    both = {**sides, **ids, **lists, "counts": "*i32"}
    return [
        spec("ranks_best_listed", _best_listed, {**sides, **lists}, ("n",)),
        spec("ranks_best_by_id", _best_by_id, {**sides, **ids}, SIZES),
        spec("ranks_count", _count, both, SIZES, LISTED=False),
        spec("ranks_count_listed", _count, both, SIZES, LISTED=True),
    ]


SPECS = _specs()
