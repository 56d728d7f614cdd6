"""Retrieval metrics, as pure functions of embeddings.

Sizes: N images, M captions, D width, F folds. For each caption, `owner` (M,) int64 holds the position in
0..N-1 of the image that the caption describes. An image may have any number of captions, or none.

Conventions, tested with matrices computed by hand:

* R@K is a *hit rate*: the percentage of queries that have at least one right candidate among the first K. It
  is not the recall of information retrieval, which divides by the number of right candidates.
* Ties count against the model: a query's rank is the number of wrong candidates that are at least as similar
  as its best right candidate. A collapsed model, with all embeddings equal, therefore scores 0 and not 100.
* An image without captions is no query of image -> text, but a wrong candidate of text -> image.
* Embeddings that are not finite are an error: no number exceeds NaN, so NaN would rank first.
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
    """The measures of one direction of retrieval, from queries to candidates."""

    hits: tuple[float, float, float]
    """R@1, R@5, R@10 in percent."""
    chance: tuple[float, float, float]
    """Expected R@1, R@5, R@10 in percent if the candidates were ordered at random."""
    median_rank: float
    """Median over queries of the rank of the best right candidate, counted from 1."""
    mean_rank: float
    """Mean over queries of the rank of the best right candidate, counted from 1."""
    queries: int
    """Number of queries that have a right candidate."""
    candidates: int
    """Number of candidates that each query is compared with."""


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Both directions of retrieval on one set of images and captions, or the mean over folds."""

    i2t: Recall
    """Image -> text."""
    t2i: Recall
    """Text -> image."""

    @property
    def rsum(self) -> float:
        """Sum of the six recalls, at most 600."""
        return sum(self.i2t.hits) + sum(self.t2i.hits)

    @property
    def chance_rsum(self) -> float:
        """Expected rSum if candidates were ordered at random."""
        return sum(self.i2t.chance) + sum(self.t2i.chance)

    def to_dict(self) -> dict:
        """Returns numbers and lists for JSON."""
        ways = {"i2t": self.i2t, "t2i": self.t2i}
        result = {"rsum": self.rsum, **{way: list(recall.hits) for way, recall in ways.items()}}
        for name in ("median_rank", "mean_rank", "queries"):
            result[name] = {way: getattr(recall, name) for way, recall in ways.items()}
        chance = {way: list(recall.chance) for way, recall in ways.items()}
        return {**result, "chance": {"rsum": self.chance_rsum, **chance}}


def normalize(embeddings: Tensor, name: str = "embeddings") -> Tensor:
    """Returns x / |x| of each row x as float32, (N, D), for cosine similarity. A zero row stays zero.

    Args:
        embeddings: (N, D), any float type.
        name: name of the embeddings in error messages.

    Raises:
        ValueError: not a matrix, or some rows are not finite; the message gives the number of such rows.
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
    """Returns R@K = 100 * mean over queries of [rank < K], for each K in `ks`.

    Args:
        ranks: (N,) int64, rank of each query's best right candidate, counted from 0.

    Source: as in Karpathy and Fei-Fei (CVPR 2015) and VSE++ (BMVC 2018) for Flickr30K and COCO.
    """
    return tuple(100.0 * float((ranks < k).double().mean()) for k in ks)


def chance_rates(right: Tensor, candidates: int, ks: tuple[int, ...] = KS) -> tuple[float, ...]:
    """Returns the expected R@K of a random order: 100 * mean over queries of 1 - C(M - P, K) / C(M, K).

    Args:
        right: (N,) int64, the number P of right candidates for each query.
        candidates: the number M of all candidates.

    Source: hypergeometric distribution; with P = 1 the expectation is 100 * K / M.
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
    """Computes the measures. ranks: (N,), counted from 0. right: (N,), right candidates of each query."""
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
        images: (N, D), not yet normalised.
        texts: (M, D), not yet normalised.
        owner: (M,) int64, position in `images` of each caption's image.

    Raises:
        ValueError: no image or caption, shapes that do not fit, an owner outside 0..N-1, or rows not finite.
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
    """Returns the mean of `recall_report` over F folds: N / F consecutive images and their captions.

    COCO "1K" is the mean over 5 folds of the 5,000 images, not the result on the first 1,000. Every measure
    is averaged over the folds, also the median rank.

    Args:
        images, texts, owner: as in `recall_report`; folds follow the order of the images.
        folds: F, a divisor of N.

    Raises:
        ValueError: F does not divide N, or a fold has no caption.
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
