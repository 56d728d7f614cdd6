"""Measures of information capacity against closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F

from d2s.evaluate import capacity


def test_effective_rank():
    assert capacity.effective_rank(torch.eye(16)) == pytest.approx(16)
    assert capacity.effective_rank(torch.eye(16).repeat(80, 1)) == pytest.approx(16)
    assert capacity.effective_rank(torch.ones(100, 16)) == pytest.approx(1, abs=1e-5)
    assert capacity.effective_rank(torch.zeros(5, 4)) == 0
    # Singular values 3 and 1: shares 3/4 and 1/4.
    wanted = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert capacity.effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(wanted)
    draw = torch.Generator().manual_seed(5)
    rows = torch.randn(70, 12, generator=draw)
    share = torch.linalg.svdvals(rows.double())
    share = share / share.sum()
    assert capacity.effective_rank(rows) == pytest.approx(float(torch.exp(-(share * share.log()).sum())))


def test_alignment_uniformity_and_gap():
    x = torch.eye(4)
    assert capacity.alignment(x, x, torch.arange(4)) == 0
    assert capacity.alignment(x, x.roll(1, 0), torch.arange(4)) == pytest.approx(2)
    assert capacity.alignment(x[:1], -x[:1], torch.tensor([0])) == pytest.approx(4)
    assert capacity.uniformity(torch.ones(5, 1)) == pytest.approx(0)
    assert capacity.uniformity(x) == pytest.approx(-4)  # all distances squared are 2
    both = torch.tensor([[1.0], [-1.0], [1.0]])  # distances squared 4, 0, 4
    assert capacity.uniformity(both) == pytest.approx(math.log((1 + 2 * math.exp(-8)) / 3))
    assert capacity.uniformity(x.repeat(50, 1), limit=4) <= 0
    assert capacity.modality_gap(x, x) == 0
    assert capacity.modality_gap(x[:1].repeat(3, 1), x[1:2]) == pytest.approx(math.sqrt(2))


def test_uniformity_by_chunks_is_that_of_all_pairs():
    rows = F.normalize(torch.randn(1500, 8, generator=torch.Generator().manual_seed(6)))
    wanted = torch.pdist(rows.double()).square().mul(-2).exp().mean().log()
    assert capacity.uniformity(rows) == pytest.approx(float(wanted), rel=1e-5)


def test_sparse_to_dense_is_a_mean_over_images():
    x = torch.eye(3)
    sparse = torch.stack([x[0], x[1], x[0], x[2]])  # image 0: axes 0 and 1; image 1: axis 0; image 2: axis 2
    dense = torch.stack([x[0], x[0], x[1]])  # image 0: axis 0; image 1: axes 0 and 1; image 2: none
    value = capacity.sparse_to_dense(sparse, torch.tensor([0, 0, 1, 2]), dense, torch.tensor([0, 1, 1]), 3)
    assert value == pytest.approx((0.5 + 0.5) / 2)
    assert math.isnan(
        capacity.sparse_to_dense(sparse[:1], torch.tensor([0]), dense[:1], torch.tensor([1]), 2)
    )
