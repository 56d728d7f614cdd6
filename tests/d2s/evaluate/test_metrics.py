"""Retrieval metrics against hand-computed matrices; measures of capacity against closed forms."""

import hashlib
import math
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from d2s.evaluate import metrics


def from_similarities(similarities: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit images (N, D) and unit texts (M, D) with exactly the cosines `similarities` (N, M) / 32.

    The images are axes; a text is its column and, on four further axes, whole numbers that make the sum
    of squares 1024 (there always are four: Lagrange). So every number is exact in float32, and ties are ties.
    """
    columns = torch.tensor(similarities).T.tolist()
    texts = [[*column, *four_squares(1024 - sum(v * v for v in column))] for column in columns]
    return F.pad(torch.eye(len(similarities)), (0, 4)), torch.tensor(texts) / 32


@cache
def four_squares(total: int) -> tuple[int, int, int, int]:
    root = math.isqrt(total)
    for a in range(root, -1, -1):
        for b in range(math.isqrt(total - a * a), -1, -1):
            for c in range(math.isqrt(total - a * a - b * b), -1, -1):
                d = math.isqrt(total - a * a - b * b - c * c)
                if a * a + b * b + c * c + d * d == total:
                    return a, b, c, d
    raise AssertionError(total)


# Three images with 2, 1 and 3 captions. Written by hand:
#            captions of 0 | 1   | of image 2
MATRIX = [
    [9, 1, 3, 2, 8, 0],  # best own 9: rank 0
    [5, 6, 4, 7, 1, 2],  # own 4; 5, 6, 7 lie before it: rank 3
    [7, 8, 5, 1, 7, 6],  # best own 7; 8 before it, another's 7 ties: rank 2
]
OWNER = torch.tensor([0, 0, 1, 2, 2, 2])
I2T = [0, 3, 2]
# columns: caption 0 own 9 first -> 0; caption 1 own 1, last -> 2; caption 2 own 4 after 5 -> 1;
# caption 3 own 1 after 2 and 7 -> 2; caption 4 own 7 after 8 -> 1; caption 5 own 6 first -> 0
T2I = [0, 2, 1, 2, 1, 0]


def test_recall_report_by_hand():
    images, texts = from_similarities(MATRIX)
    report = metrics.recall_report(images, texts, OWNER)
    assert report.i2t.hits == pytest.approx((100 / 3, 100, 100))
    assert report.t2i.hits == pytest.approx((100 * 2 / 6, 100, 100))
    assert report.rsum == pytest.approx(100 / 3 * 2 + 400)
    assert report.i2t.median_rank == 3  # of 1, 4, 3
    assert report.i2t.mean_rank == pytest.approx(sum(I2T) / 3 + 1)
    assert report.t2i.median_rank == 2  # of 1, 3, 2, 3, 2, 1
    assert report.t2i.mean_rank == pytest.approx(sum(T2I) / 6 + 1)
    assert (report.i2t.queries, report.i2t.candidates) == (3, 6)
    assert (report.t2i.queries, report.t2i.candidates) == (6, 3)


def test_hit_rates_by_hand():
    ranks = torch.tensor([0, 1, 4, 5, 9, 10, 100, 0])
    assert metrics.hit_rates(ranks) == (25.0, 50.0, 75.0)


def test_a_hit_needs_one_caption_not_all():
    # One image's five captions come first: recall in the other sense is 20 at 1, the hit rate 100.
    images, texts = from_similarities([[9, 8, 7, 6, 5, 1], [1, 1, 1, 1, 1, 9]])
    report = metrics.recall_report(images, texts, torch.tensor([0, 0, 0, 0, 0, 1]))
    assert report.i2t.hits[0] == 100


def test_collapsed_model_scores_nothing():
    row = F.normalize(torch.randn(1, 32, generator=torch.Generator().manual_seed(0)))
    images, texts = row.repeat(60, 1), row.repeat(300, 1)
    report = metrics.recall_report(images, texts, torch.arange(60).repeat_interleave(5))
    assert report.rsum <= report.chance_rsum
    report = metrics.recall_report(images * 0, texts * 0, torch.arange(60).repeat_interleave(5))
    assert report.rsum == 0
    assert report.i2t.mean_rank == 296
    assert report.t2i.mean_rank == 60


def test_image_without_captions_misleads_but_does_not_ask():
    # Image 1 has no caption. It lies nearest to caption 0, so caption 0 finds its own image only second.
    images, texts = from_similarities([[5, 1], [9, 1], [2, 9]])
    report = metrics.recall_report(images, texts, torch.tensor([0, 2]))
    assert report.i2t.queries == 2
    assert report.i2t.hits[0] == 100
    assert report.t2i.candidates == 3
    assert report.t2i.hits == (50.0, 100.0, 100.0)


def test_order_of_captions_does_not_matter():
    images, texts = from_similarities(MATRIX)
    turn = torch.tensor([4, 0, 5, 2, 1, 3])
    assert metrics.recall_report(images, texts[turn], OWNER[turn]) == metrics.recall_report(
        images, texts, OWNER
    )


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=9).filter(any), st.integers(0, 2**20))
def test_agrees_with_ranks_counted_one_by_one(counts: list[int], seed: int):
    draw = torch.Generator().manual_seed(seed)
    # Few distinct values make ties frequent.
    similarity = torch.randint(0, 4, (len(counts), sum(counts)), generator=draw).tolist()
    images, texts = from_similarities(similarity)
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    i2t, t2i = [], []
    for i in range(len(counts)):
        own = [similarity[i][j] for j in range(len(owner)) if owner[j] == i]
        if own:
            i2t.append(sum((similarity[i][j] >= max(own)) for j in range(len(owner)) if owner[j] != i))
    for j in range(len(owner)):
        mine = similarity[owner[j]][j]
        t2i.append(sum((similarity[i][j] >= mine) for i in range(len(counts)) if i != owner[j]))
    report = metrics.recall_report(images, texts, owner)
    assert report.i2t.hits == pytest.approx([100 * sum(r < k for r in i2t) / len(i2t) for k in (1, 5, 10)])
    assert report.t2i.hits == pytest.approx([100 * sum(r < k for r in t2i) / len(t2i) for k in (1, 5, 10)])
    assert report.t2i.mean_rank == pytest.approx(sum(t2i) / len(t2i) + 1)


def test_chance_of_the_usual_split():
    # 500 images with five captions: 0.2, 1, 2 from text; from an image 5 of 2,500 are right: nearly the same.
    images = torch.nn.functional.normalize(torch.randn(500, 4, generator=torch.Generator().manual_seed(1)))
    report = metrics.recall_report(
        images, images.repeat_interleave(5, 0), torch.arange(500).repeat_interleave(5)
    )
    assert report.t2i.chance == pytest.approx((0.2, 1.0, 2.0))
    assert report.i2t.chance[0] == pytest.approx(0.2)
    assert report.i2t.chance[2] == pytest.approx(100 * (1 - math.comb(2495, 10) / math.comb(2500, 10)))
    assert report.chance_rsum == pytest.approx(6.4, abs=0.05)


def test_chance_when_there_are_fewer_candidates_than_k():
    assert metrics.chance_rates(torch.tensor([1, 2]), 3) == pytest.approx((50.0, 100.0, 100.0))


def test_random_embeddings_score_at_chance():
    draw = torch.Generator().manual_seed(3)
    owner = torch.arange(400).repeat_interleave(5)
    reports = [
        metrics.recall_report(
            torch.randn(400, 64, generator=draw), torch.randn(2000, 64, generator=draw), owner
        )
        for _ in range(5)
    ]
    assert sum(r.rsum for r in reports) / 5 == pytest.approx(reports[0].chance_rsum, rel=0.2)


def test_folds_are_the_mean_of_consecutive_parts():
    draw = torch.Generator().manual_seed(4)
    images = torch.randn(30, 8, generator=draw)
    owner = torch.arange(30).repeat_interleave(5)
    texts = images[owner] + 1.5 * torch.randn(150, 8, generator=draw)
    parts = [
        metrics.recall_report(images[a : a + 10], texts[5 * a : 5 * a + 50], owner[:50]) for a in (0, 10, 20)
    ]
    folded = metrics.fold_report(images, texts, owner, folds=3)
    assert folded.rsum == pytest.approx(sum(p.rsum for p in parts) / 3)
    assert folded.rsum != pytest.approx(parts[0].rsum)
    assert folded.rsum > metrics.recall_report(images, texts, owner).rsum
    assert folded.t2i.candidates == 10
    with pytest.raises(ValueError, match="30 images cannot be cut into 4"):
        metrics.fold_report(images, texts, owner, folds=4)


@pytest.mark.parametrize(
    "images, texts, owner, message",
    [
        (
            torch.full((2, 3), float("nan")),
            torch.ones(2, 3),
            [0, 1],
            "image embeddings: 2 of 2 rows are not finite",
        ),
        (torch.ones(2, 3), torch.tensor([[1.0, 2, 3], [1, math.inf, 0]]), [0, 1], "1 of 2 rows"),
        (torch.ones(2, 3), torch.ones(2, 4), [0, 1], "width 3, caption width 4"),
        (torch.ones(2, 3), torch.ones(0, 3), [], "there are 2 and 0"),
        (torch.ones(2, 3), torch.ones(2, 3), [0, 2], "0..1"),
        (torch.ones(2, 3), torch.ones(2, 3), [0], "one image per caption"),
        (torch.ones(3), torch.ones(2, 3), [0], "shape"),
    ],
)
def test_mistakes_are_named(images, texts, owner, message):
    with pytest.raises(ValueError, match=message):
        metrics.recall_report(images, texts, torch.tensor(owner, dtype=torch.int64))


# R@1, R@5, R@10 that eccv_caption 0.1.0 (PyPI) gave for the embeddings below, laid out as its own
# 5,000 images of the COCO test split with 5 captions each, in the order of its list coco_test_ids:
# Metrics().coco_5k_recalls and coco_1k_recalls over complete rankings by float64 cosine.
# Its other metrics (ECCV, CxC) are about other ground truth and are not covered.
ECCV_5K = ((10.34, 29.0, 42.28), (6.004, 16.992, 24.516))
ECCV_1K = ((26.18, 59.68, 73.72), (15.224, 36.276, 48.524))
ECCV_INPUT = "11aa7775b0a7e3b9ceb5846fb204c2dfa2839f00a84f3e458814e201dd2c4c86"


@pytest.mark.slow
def test_agrees_with_eccv_caption_on_coco_5k_and_1k():
    draw = np.random.Generator(np.random.PCG64(20240731))
    # Whole numbers are the same on every machine, so the input can be pinned by its hash.
    images = draw.integers(-8, 9, (5000, 24)).astype("<f4")
    texts = images.repeat(5, 0) + draw.integers(-16, 17, (25000, 24)).astype("<f4")
    assert hashlib.sha256(images.tobytes() + texts.tobytes()).hexdigest() == ECCV_INPUT
    owner = torch.arange(5000).repeat_interleave(5)
    whole = metrics.recall_report(torch.from_numpy(images), torch.from_numpy(texts), owner)
    folded = metrics.fold_report(torch.from_numpy(images), torch.from_numpy(texts), owner, folds=5)
    for report, (i2t, t2i) in ((whole, ECCV_5K), (folded, ECCV_1K)):
        assert report.i2t.hits == pytest.approx(i2t, abs=1e-6)
        assert report.t2i.hits == pytest.approx(t2i, abs=1e-6)
