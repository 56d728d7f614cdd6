"""Distillation and ranks against their oracles and against numbers worked out by hand."""

import pytest
import torch
from problems import Numbers, image_ids, sides, value_and_gradients, worst
from torch.nn.functional import normalize

from d2s.kernels import functional, reference
from d2s.kernels.chunked import common


@pytest.mark.parametrize("normal", [True, False])
@pytest.mark.parametrize("kind", ["cosine", "l1", "l2"])
def test_pointwise_agrees_with_oracle_and_gradcheck(kind, normal):
    student, teacher = (3 * x for x in sides(7, 5, 1))
    student[2] = 0 if normal else student[2]

    def run(module, s):
        return module.pointwise_distillation(s, teacher, kind=kind, normalize=normal)

    ours = value_and_gradients(lambda s: run(functional, s), student)
    assert worst(ours, value_and_gradients(lambda s: run(reference, s), student)) < 1e-10
    apart = student[[0, 1, 3, 4, 5, 6]].requires_grad_()
    teacher = teacher[[0, 1, 3, 4, 5, 6]]
    assert torch.autograd.gradcheck(lambda s: run(functional, s), apart)


def test_pointwise_by_hand():
    student, teacher = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[0.0, 2.0], [5.0, 0.0]])
    got = {
        kind: float(functional.pointwise_distillation(student, teacher, kind=kind, normalize=True))
        for kind in ("cosine", "l1", "l2")
    }
    assert got == pytest.approx({"cosine": 0.2, "l1": 0.8, "l2": 0.4})


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("entries", [1 << 21, 90])
def test_relational_agrees_with_oracle(temperature, entries, monkeypatch):
    monkeypatch.setattr(common, "CHUNK_ENTRIES", entries)
    monkeypatch.setattr(common, "MIN_ROWS", 4)
    student, teacher = sides(30, 8, 2)
    wider = normalize(Numbers(0).randn(30, 11).double(), dim=1)
    for rows in (slice(0, 30), slice(4, 21)):

        def run(module, s, every, rows=rows):
            return module.relational_distillation(s, wider[rows], every, wider, temperature=temperature)

        ours = value_and_gradients(lambda *x: run(functional, *x), student[rows], teacher)
        theirs = value_and_gradients(lambda *x: run(reference, *x), student[rows], teacher)
        assert worst(ours, theirs) < 1e-10


def test_relational_gradcheck_and_floor():
    student, teacher = sides(6, 4, 3)
    student.requires_grad_()

    def loss(s):
        return functional.relational_distillation(s, teacher, s, teacher, temperature=0.5)

    assert torch.autograd.gradcheck(loss, student)
    assert float(loss(teacher)) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("entries", [1 << 21, 300])
@pytest.mark.parametrize("kind", ["random", "duplicated"])
def test_ranks_agree_with_oracle(entries, kind, monkeypatch):
    monkeypatch.setattr(common, "CHUNK_ENTRIES", entries)
    monkeypatch.setattr(common, "MIN_ROWS", 4)
    queries, candidates = sides(50, 6, 5, kind)
    candidates = candidates[:37]
    query_ids, candidate_ids = image_ids(50, 12, 1), image_ids(37, 11, 2)
    theirs = reference.retrieval_ranks(queries, candidates, None, query_ids, candidate_ids)
    assert torch.equal(
        functional.retrieval_ranks(queries, candidates, query_ids=query_ids, candidate_ids=candidate_ids),
        theirs,
    )
    same = query_ids[:, None] == candidate_ids
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), same.sum(1).cumsum(0)])
    listed = (starts, same.nonzero()[:, 1])
    assert torch.equal(functional.retrieval_ranks(queries, candidates, listed), theirs)
    assert torch.equal(reference.retrieval_ranks(queries, candidates, listed, None, None), theirs)


def test_ranks_by_hand():
    """Similarities 4 3 3 1; ties, several positives, none at all, and a similarity that is not a number."""
    candidates = torch.tensor([[4.0], [3.0], [3.0], [1.0]])
    queries = torch.ones(5, 1)
    ids = torch.tensor([10, 11, 12, 13])
    ranks = functional.retrieval_ranks(
        queries, candidates, query_ids=torch.tensor([10, 11, 12, 13, 99]), candidate_ids=ids
    )
    assert ranks.tolist() == [0, 2, 2, 3, 4]
    listed = torch.tensor([0, 2, 4]), torch.tensor([1, 2, 3, 3])
    assert functional.retrieval_ranks(queries[:2], candidates, listed).tolist() == [1, 3]
    candidates[0] = torch.nan
    ranks = functional.retrieval_ranks(
        queries, candidates, query_ids=torch.tensor([10, 11, 12, 13, 99]), candidate_ids=ids
    )
    assert ranks.tolist() == [3, 2, 2, 3, 4]


def test_collapsed_model_has_the_worst_ranks():
    same = torch.ones(20, 8)
    ranks = functional.retrieval_ranks(same, same, query_ids=torch.arange(20), candidate_ids=torch.arange(20))
    assert ranks.tolist() == [19] * 20


@pytest.mark.parametrize("kind", ["cosine", "l1", "l2"])
def test_a_norm_beyond_its_type_shows_in_the_loss(kind):
    rows = Numbers(0).randn(4, 8)
    for student, teacher in ((rows * 1e20, rows), (rows, rows * 1e20)):
        assert functional.pointwise_distillation(student, teacher, kind=kind).isnan()
