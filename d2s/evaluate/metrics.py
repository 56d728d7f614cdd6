"""Computes retrieval metrics from embeddings, as pure functions.

Sizes: N images, M captions, D width, F folds. `owner` is an int64 tensor of shape (M,). For each caption it
holds the position (0 to N - 1) of the image that the caption describes. An image may have no caption.

The tests check these conventions on matrices computed by hand:

* R@K is a *hit rate*: the percentage of queries that have at least one right candidate among the first K. It
  is not the recall of information retrieval, which divides by the number of right candidates.
* Ties count against the model. A query's rank is the number of wrong candidates that are at least as similar
  to the query as the best right candidate. If all embeddings are equal, the model scores 0 and not 100.
* An image without captions is not a query of image -> text, but it is a wrong candidate of text -> image.
* An embedding with NaN or inf is an error. No number is greater than NaN, so NaN would rank first.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from d2s.kernels import retrieval_ranks

KS = (1, 5, 10)


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Holds the measures of one direction of retrieval, from queries to candidates."""

    hits: tuple[float, float, float]
    """R@1, R@5 and R@10, in percent."""
    chance: tuple[float, float, float]
    """Expected values of R@1, R@5 and R@10, in percent, if the candidates were ordered at random."""
    median_rank: float
    """Median over queries of the rank of the best right candidate, counted from 1."""
    mean_rank: float
    """Mean over queries of the rank of the best right candidate, counted from 1."""
    queries: int
    """Number of queries that have at least one right candidate."""
    candidates: int
    """Number of candidates. Each query is compared with all of them."""


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Holds the measures of both directions on one set of images and captions, or their mean over folds."""

    i2t: Recall
    """Measures of image -> text: images are queries, and captions are candidates."""
    t2i: Recall
    """Measures of text -> image: captions are queries, and images are candidates."""

    @property
    def rsum(self) -> float:
        """Returns the sum of R@1, R@5 and R@10 in both directions, at most 600."""
        return sum(self.i2t.hits) + sum(self.t2i.hits)

    @property
    def chance_rsum(self) -> float:
        """Returns the expected value of rSum if the candidates were ordered at random."""
        return sum(self.i2t.chance) + sum(self.t2i.chance)

    def to_dict(self) -> dict:
        """Returns a dictionary that can be written as JSON."""
        ways = {"i2t": self.i2t, "t2i": self.t2i}
        result = {"rsum": self.rsum, **{way: list(recall.hits) for way, recall in ways.items()}}
        for name in ("median_rank", "mean_rank", "queries"):
            result[name] = {way: getattr(recall, name) for way, recall in ways.items()}
        chance = {way: list(recall.chance) for way, recall in ways.items()}
        return {**result, "chance": {"rsum": self.chance_rsum, **chance}}


def normalize(embeddings: Tensor, name: str = "embeddings") -> Tensor:
    """Scales rows to length 1, so that dot products are cosine similarities. Returns float32.

    A row of zeros stays zero. The result has the shape of the input.
    embeddings: shape (N, D), any float type. name: name of the embeddings in error messages.

    Raises ValueError if `embeddings` is not a matrix, or if a row contains inf or NaN.
    """
    if embeddings.ndim != 2:
        raise ValueError(f"{name} must have the shape (number, width), not {tuple(embeddings.shape)}")
    bad = int((~torch.isfinite(embeddings).all(1)).sum())
    if bad:
        raise ValueError(
            f"{name}: {bad} of {len(embeddings)} rows are not finite and cannot be ranked; the weights have probably"
            " diverged: use an earlier checkpoint"
        )
    return F.normalize(embeddings.float(), dim=1)


def hit_rates(ranks: Tensor, ks: tuple[int, ...] = KS) -> tuple[float, ...]:
    """Returns R@K for each K in `ks`: the percentage of queries with rank < K.

    ranks: int64, one for each query: the rank of the best right candidate, counted from 0.

    Source: Karpathy and Fei-Fei (CVPR 2015) and VSE++ (BMVC 2018), for Flickr30K and COCO.
    """
    return tuple(100.0 * float((ranks < k).double().mean()) for k in ks)


def chance_rates(right: Tensor, candidates: int, ks: tuple[int, ...] = KS) -> tuple[float, ...]:
    """Returns, for each K in `ks`, the expected value of R@K if candidates are ordered at random.

    It is the mean over queries of 100 * (1 - C(M - P, K) / C(M, K)). C(a, b) is a binomial coefficient, M is
    `candidates`, the number of candidates, and P is the query's entry in `right`, its number of right
    candidates. If P = 1, the expected value is 100 * K / M.

    Source: hypergeometric distribution.
    """
    rates = []
    missed = torch.ones(len(right), dtype=torch.float64)
    wrong = (candidates - right.cpu()).double()
    for drawn in range(max(ks)):
        if drawn < candidates:
            missed = missed * ((wrong - drawn).clamp(min=0) / (candidates - drawn))
        if drawn + 1 in ks:
            rates.append(100.0 * float((1 - missed).mean()))
    return tuple(rates)


def summarize(ranks: Tensor, right: Tensor, candidates: int) -> Recall:
    """Computes the measures of one direction. `hit_rates` and `chance_rates` explain the arguments."""
    assert len(ranks) == len(right) > 0
    ordered = torch.sort(ranks.double()).values
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return Recall(
        hits=hit_rates(ranks),
        chance=chance_rates(right, candidates),
        median_rank=float(middle) + 1,
        mean_rank=float(ranks.double().mean()) + 1,
        queries=len(ranks),
        candidates=candidates,
    )


def recall_report(images: Tensor, texts: Tensor, owner: Tensor) -> Retrieval:
    """Computes R@1/5/10, median rank and mean rank in both directions, by cosine similarity.

    Similarities are computed in chunks, so this needs only O(N + M) memory besides the embeddings.

    Args:
        images, texts: embeddings of shapes (N, D) and (M, D). They need not have length 1.
        owner: int64, of shape (M,): the row in `images` of each caption's image.

    Raises ValueError if there is no image or no caption, if the shapes do not fit together, if an owner is
    outside 0 to N - 1, or if an embedding is not finite.
    """
    images, texts = normalize(images, "image embeddings"), normalize(texts, "caption embeddings")
    owner = owner.to(images.device)
    if len(texts) == 0 or len(images) == 0:
        raise ValueError(f"retrieval needs images and captions, but there are {len(images)} and {len(texts)}")
    if images.shape[1] != texts.shape[1]:
        widths = f"image width {images.shape[1]}, caption width {texts.shape[1]}"
        raise ValueError(f"{widths}: embed both with one model")
    if owner.shape != (len(texts),):
        raise ValueError(
            f"owner must hold one image per caption: {tuple(owner.shape)} for {len(texts)} captions"
        )
    if int(owner.min()) < 0 or int(owner.max()) >= len(images):
        raise ValueError(f"owner must lie in 0..{len(images) - 1}, but spans {owner.min()}..{owner.max()}")
    right = torch.bincount(owner, minlength=len(images))
    queries = torch.nonzero(right).squeeze(1)
    i2t = retrieval_ranks(images[queries], texts, query_ids=queries, candidate_ids=owner)
    all_images = torch.arange(len(images), device=images.device)
    t2i = retrieval_ranks(texts, images, query_ids=owner, candidate_ids=all_images)
    return Retrieval(
        i2t=summarize(i2t, right[queries], len(texts)),
        t2i=summarize(t2i, torch.ones_like(owner), len(images)),
    )


def fold_report(images: Tensor, texts: Tensor, owner: Tensor, *, folds: int) -> Retrieval:
    """Returns the mean of `recall_report` over folds. Every measure is averaged, also the median rank.

    A fold consists of N / F consecutive images and their captions. "COCO 1K" is the mean over 5 folds of the
    5,000 test images, and not the result on the first 1,000 images.

    images, texts, owner: as in `recall_report`. folds: the number F of folds, a divisor of N.
    Raises ValueError if F does not divide N, or if a fold has no caption.
    """
    if folds < 1 or len(images) % folds:
        raise ValueError(f"{len(images)} images cannot be cut into {folds} equal folds: choose a divisor")
    size = len(images) // folds
    reports = []
    for start in range(0, len(images), size):
        inside = (owner >= start) & (owner < start + size)
        reports.append(recall_report(images[start : start + size], texts[inside], owner[inside] - start))
    return Retrieval(i2t=_mean([r.i2t for r in reports]), t2i=_mean([r.t2i for r in reports]))


def _mean(recalls: list[Recall]) -> Recall:
    def mean(values: Iterable[float]) -> float:
        return sum(values) / len(recalls)

    return Recall(
        hits=tuple(map(mean, zip(*(recall.hits for recall in recalls), strict=True))),
        chance=tuple(map(mean, zip(*(recall.chance for recall in recalls), strict=True))),
        median_rank=mean(recall.median_rank for recall in recalls),
        mean_rank=mean(recall.mean_rank for recall in recalls),
        queries=round(mean(recall.queries for recall in recalls)),
        candidates=round(mean(recall.candidates for recall in recalls)),
    )
