"""Ties count against the model to the last bit, whatever the sizes, the scale, the library and the blocks."""

import random
from fractions import Fraction

import pytest
import torch
from torch.nn.functional import normalize

from d2s.kernels import functional, reference
from d2s.kernels.chunked import common, exact

try:
    from d2s.kernels.fused import ranks as fused
except ImportError:
    fused = None

TYPES = (torch.float32, torch.float64)


def drawn(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def ranks(queries, candidates, query_ids, candidate_ids):
    return functional.retrieval_ranks(queries, candidates, query_ids=query_ids, candidate_ids=candidate_ids)


def by_definition(queries, candidates, query_ids, candidate_ids):
    """Ranks by sums of fractions, which do not round."""
    out = []
    columns = [[Fraction(x) for x in row] for row in candidates.tolist()]
    for query, own_id in zip(queries.tolist(), query_ids.tolist(), strict=True):
        q = [Fraction(x) for x in query]
        s = [sum(a * b for a, b in zip(q, row, strict=True)) for row in columns]
        own = [x == own_id for x in candidate_ids.tolist()]
        best = max((x for x, mine in zip(s, own, strict=True) if mine), default=None)
        out.append(sum(not mine and (best is None or x >= best) for x, mine in zip(s, own, strict=True)))
    return torch.tensor(out)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("module", ["functional", "reference"])
@pytest.mark.parametrize("n, m, width", [(50, 5, 6), (7, 5, 6), (3, 9, 64), (200, 1001, 96)])
def test_collapsed_model_has_the_worst_ranks(n, m, width, module, dtype):
    candidates = normalize(drawn(1, width, seed=1, dtype=dtype), dim=1).repeat(m, 1)
    queries = normalize(drawn(n, width, seed=2, dtype=dtype), dim=1)
    ids = torch.full((n,), m - 1), torch.arange(m)
    got = (
        ranks(queries, candidates, *ids)
        if module == "functional"
        else reference.retrieval_ranks(queries, candidates, None, *ids)
    )
    assert got.tolist() == [m - 1] * n


@pytest.mark.parametrize("dtype", TYPES)
def test_random_duplicates_by_definition(dtype, monkeypatch):
    """Few queries, so that a library takes its special ways; the definition, the oracle and the interpreter agree."""
    rng = random.Random(str(dtype))
    for seed in range(100):
        monkeypatch.setattr(common, "CHUNK_ENTRIES", rng.choice((1, 1 << 22)))
        monkeypatch.setattr(common, "MIN_ROWS", rng.choice((1, 32)))
        monkeypatch.setattr(exact, "CUT_ENTRIES", rng.choice((1, 300, 1 << 20)))
        n, m, width = rng.randint(1, 7), rng.randint(5, 20), rng.randint(1, 64)
        distinct = drawn(rng.randint(1, m), width, seed=seed, dtype=dtype)
        candidates = normalize(distinct, dim=1)[torch.tensor(rng.choices(range(len(distinct)), k=m))]
        queries = normalize(drawn(n, width, seed=seed + 1000, dtype=dtype), dim=1)
        ids = torch.tensor(rng.choices(range(5), k=n)), torch.tensor(rng.choices(range(6), k=m))
        wanted = by_definition(queries, candidates, *ids)
        assert torch.equal(ranks(queries, candidates, *ids), wanted)
        assert torch.equal(reference.retrieval_ranks(queries, candidates, None, *ids), wanted)
        if fused is not None and fused.INTERPRETED and dtype == torch.float32 and seed % 10 == 0:
            assert torch.equal(fused.retrieval_ranks(queries, candidates, None, *ids), wanted)


@pytest.mark.parametrize("sparse", [1, 64, 10**9])
@pytest.mark.parametrize("noise", [0, 1e-7, 1e-5, 1e-2])
def test_the_way_it_is_decided_does_not_show(noise, sparse, monkeypatch):
    """Similarities from equal to far apart, decided pair by pair or by whole rows, in batches of any size."""
    monkeypatch.setattr("d2s.kernels.chunked.ranks.SPARSE", sparse)
    candidates = normalize(drawn(1, 20, seed=0) + noise * drawn(120, 20, seed=1), dim=1)
    candidates = candidates[torch.arange(120) // 2]
    queries, ids = normalize(drawn(24, 20, seed=2), dim=1), (torch.arange(24) % 9, torch.arange(120) % 13)
    wanted = by_definition(queries, candidates, *ids)
    assert torch.equal(ranks(queries, candidates, *ids), wanted)
    alone = [ranks(queries[i : i + 1], candidates, ids[0][i : i + 1], ids[1]) for i in range(24)]
    assert torch.equal(torch.cat(alone), wanted)
    # Candidates behind the last that nobody is near to: another shape of the same products.
    far = torch.cat([candidates, -candidates[:1].repeat(37, 1)])
    more = torch.cat([ids[1], torch.full((37,), -1)])
    assert torch.equal(ranks(queries, far, ids[0], more), by_definition(queries, far, ids[0], more))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("part", [-0.85, -0.5, 0.5, 0.95])
def test_the_scale_of_the_embeddings_does_not_show(part, dtype):
    """Up to scales at which products are too large or too small for a number."""
    candidates = normalize(drawn(60, 24, seed=3, dtype=dtype), dim=1)[torch.arange(60) // 3]
    queries, ids = normalize(drawn(20, 24, seed=4, dtype=dtype), dim=1), (torch.arange(20), torch.arange(60))
    wanted = ranks(queries, candidates, *ids)
    scale = 2.0 ** int(part * (1000 if dtype == torch.float64 else 126))
    assert torch.equal(ranks(queries * scale, candidates, *ids), wanted)
    assert torch.equal(ranks(queries, candidates * scale, *ids), wanted)
    assert torch.equal(ranks(queries * scale, candidates * scale, *ids), wanted)


@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_infinite_or_no_number_among_near_ties(dtype):
    candidates = normalize(drawn(1, 8, seed=5, dtype=dtype), dim=1).repeat(40, 1)
    queries = normalize(drawn(12, 8, seed=6, dtype=dtype), dim=1)
    queries[2], queries[3, 0] = torch.nan, torch.inf
    candidates[7], candidates[9, 3], candidates[11, 3] = torch.nan, torch.inf, -torch.inf
    ids = torch.arange(12), torch.arange(40) % 20
    exact_ranks = reference.retrieval_ranks(queries, candidates, None, *ids)
    assert torch.equal(ranks(queries, candidates, *ids), exact_ranks)
    assert exact_ranks[2] == 38
    # One that is far longer than all others leaves them to the exact products.
    candidates[15] *= 1e30
    assert torch.equal(
        ranks(queries, candidates, *ids), reference.retrieval_ranks(queries, candidates, None, *ids)
    )


@pytest.mark.parametrize("zero", ["queries", "candidates"])
def test_zeros_tie(zero):
    sides = {"queries": drawn(6, 5, seed=0), "candidates": drawn(9, 5, seed=1)}
    sides[zero].zero_()
    got = ranks(*sides.values(), torch.arange(6), torch.arange(9))
    assert got.tolist() == [8] * 6


def test_exact_products_are_exact_and_their_error_is_bounded():
    for dtype in TYPES:
        for width in (1, 7, 100, 3000):
            a, b = (normalize(drawn(9, width, seed=width + k, dtype=dtype), dim=1) for k in (0, 1))
            power = 2.0 ** torch.frexp(a.double().abs().amax(1, keepdim=True)).exponent.sub(1).double()
            got = exact.exact_products(a, b, torch.arange(9)) * power * 2.0 ** -(2 * bits_of(width, dtype))
            at = torch.randint(9, (2500,), generator=torch.Generator().manual_seed(0))
            assert torch.equal(
                exact.exact_products(a, b, at), exact.exact_products(a, b, torch.arange(9))[:, at]
            )
            # float64's own product errs by as much as float64 does.
            room = exact.exact_error(width, dtype) + width * 2.0**-52
            assert float((got - a.double() @ b.double().t()).abs().max()) <= room


def bits_of(width, dtype):
    return exact._bits(width, exact._slices(dtype))


def test_candidates_in_another_type():
    queries, candidates = drawn(9, 6, seed=0, dtype=torch.float64), drawn(20, 6, seed=1, dtype=torch.float64)
    ids = torch.arange(9), torch.arange(20) % 10
    for one, other in [
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.float64),
    ]:
        q, c = queries.to(one), candidates.to(other)
        assert torch.equal(ranks(q, c, *ids), by_definition(q, c, *ids))


@pytest.fixture
def shorter():
    """Products of float32 matrices may be taken of bf16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def test_products_of_shortened_numbers_decide_less(shorter, monkeypatch):
    """A processor that has no such product is given one."""
    queries, candidates = normalize(drawn(40, 16, seed=0), dim=1), normalize(drawn(90, 16, seed=1), dim=1)
    ids = torch.arange(40), torch.arange(90) % 45
    plain = torch.addmm

    def of_bf16(start, a, b, **rest):
        return plain(start, a.bfloat16().float(), b.bfloat16().float(), **rest)

    monkeypatch.setattr(torch, "addmm", of_bf16)
    assert torch.equal(ranks(queries, candidates, *ids), by_definition(queries, candidates, *ids))
    torch.set_float32_matmul_precision("highest")
    assert not torch.equal(ranks(queries, candidates, *ids), by_definition(queries, candidates, *ids))
