"""Ranks in Triton: whole numbers, so that the oracle's are the same to the last one."""

import pytest
import torch
from judge import DTYPES, spread, strided
from problems import Numbers
from torch.nn.functional import normalize

from d2s.kernels import reference
from d2s.kernels.fused import ranks
from d2s.kernels.fused.ranks import retrieval_ranks


def problem(n, m, width, dtype=torch.float32, distinct=12):
    """queries, candidates and their ids: small whole numbers, whose products tie often and are exact."""
    g = Numbers(n + m)
    queries = g.randint(-2, 3, (n, width)).to(dtype)
    candidates = g.randint(-2, 3, (m, width)).to(dtype)
    query_ids = g.randint(distinct, (n,)) * 10**10
    return queries, candidates, query_ids, g.randint(distinct + 2, (m,)) * 10**10


def lists(query_ids, candidate_ids):
    same = query_ids[:, None] == candidate_ids
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), same.sum(1).cumsum(0)])
    return starts, same.nonzero()[:, 1]


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 17, 31), (17, 2, 64), (129, 70, 123), (66, 200, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_oracle(shape, dtype):
    queries, candidates, *ids = problem(*shape, dtype)
    exact = reference.retrieval_ranks(queries, candidates, None, *ids)
    assert torch.equal(retrieval_ranks(queries, candidates, None, *ids), exact)
    assert torch.equal(retrieval_ranks(queries, candidates, lists(*ids), None, None), exact)


@pytest.mark.parametrize("listed", [True, False])
def test_what_is_no_number_counts_against_the_model(listed):
    queries, candidates, *ids = problem(20, 90, 5)
    candidates[3], candidates[70], queries[7] = torch.nan, torch.nan, torch.nan
    # Query 0 has but one positive, and its similarity is no number.
    ids[0][0], ids[1][70] = 5, 5
    exact = reference.retrieval_ranks(queries, candidates, None, *ids)
    assert exact[0] == 89
    given = (lists(*ids), None, None) if listed else (None, *ids)
    assert torch.equal(retrieval_ranks(queries, candidates, *given), exact)


def test_lists_with_gaps_and_repetitions():
    """More positives than a tile has columns, queries without any, and a positive that is named twice."""
    queries, candidates, *_ = problem(9, 150, 6)
    count = torch.tensor([0, 140, 0, 0, 3, 70, 1, 2, 0])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), count.cumsum(0)])
    g = Numbers(3)
    indices = g.randint(150, (int(starts[-1]),))
    indices[-1] = indices[-2]
    exact = reference.retrieval_ranks(queries, candidates, (starts, indices), None, None)
    ours = retrieval_ranks(queries, candidates, (starts, indices), None, None)
    assert torch.equal(ours, exact)
    assert ours[0] == 150
    none = torch.zeros(10, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    assert retrieval_ranks(queries, candidates, none, None, None).tolist() == [150] * 9


@pytest.mark.parametrize("listed", [True, False])
def test_equal_candidates_tie_to_the_last_bit(listed):
    """A collapsed model: both sweeps must come to the same similarity wherever the candidate stands."""
    row = normalize(spread(1, 123, seed=1), dim=1)
    queries, candidates = spread(70, 123, seed=2), row.expand(150, 123)
    ids = torch.arange(70), torch.arange(150)
    given = (lists(*ids), None, None) if listed else (None, *ids)
    assert retrieval_ranks(queries, candidates, *given).tolist() == [149] * 70


def test_near_ties_of_long_rows():
    """Where similarities are no whole numbers the best positive is still compared with itself."""
    queries, candidates = (normalize(spread(n, 100, seed=n), dim=1) for n in (40, 130))
    ids = torch.arange(40) % 7, torch.arange(130) % 9
    exact = reference.retrieval_ranks(queries, candidates, None, *ids)
    assert torch.equal(retrieval_ranks(queries, candidates, None, *ids), exact)
    assert torch.equal(retrieval_ranks(queries, candidates, lists(*ids), None, None), exact)


def test_ranges_repeats_and_strides(monkeypatch):
    queries, candidates, *ids = problem(70, 300, 6)
    whole = retrieval_ranks(queries, candidates, None, *ids)
    monkeypatch.setattr(ranks, "PROGRAMS", 1)
    ids = [torch.stack([x, x + 1], 1)[:, 0] for x in ids]
    assert torch.equal(retrieval_ranks(strided(queries), strided(candidates), None, *ids), whole)
    starts, indices = (torch.stack([x, x + 1], 1)[:, 0] for x in lists(*ids))
    assert torch.equal(retrieval_ranks(queries, candidates.double(), (starts, indices), None, None), whole)
