"""Chooses queries for the report, finds their top five candidates, and computes similarities of pairs."""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from d2s.evaluate.embed import Embeddings
from d2s.evaluate.metrics import normalize
from d2s.kernels import retrieval_ranks
from d2s.preprocess.images import decode
from d2s.shards.read.index import ShardIndex
from d2s.shards.read.records import ShardReader

TOP = 5
THUMBNAIL = 160
_CHUNK = 1024
# The outcome of a query is the entry whose (lowest, highest) range contains the rank of its best right answer.
OUTCOMES = {"hit": (1, 1), "near": (2, TOP), "miss": (TOP + 1, 1 << 62)}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A candidate in the answer list of a query."""

    image: int
    """Position of the picture in the split. For a caption, it is the position of the described picture."""
    text: str | None
    """The caption, or None if the candidate is a picture."""
    similarity: float
    right: bool
    rank: int
    """Rank among all candidates, from 1."""


@dataclass(frozen=True, kw_only=True)
class Query:
    """A query with its best answers."""

    image: int
    """Position of a picture in the split, as in `Answer`."""
    text: str | None
    """The caption, or None if the query is a picture."""
    rank: int
    """Rank of the best right answer, from 1. A wrong answer with equal similarity ranks before it."""
    outcome: str
    """"hit" (rank 1), "near" (2 to 5), or "miss"."""
    answers: list[Answer]
    """The first five answers. The best right answer follows if it is not one of the five."""


@dataclass(frozen=True, kw_only=True)
class Direction:
    """The results of one direction, image to text or text to image, for n queries."""

    queries: list[Query]
    """The few queries that the report shows."""
    percent: dict[str, float]
    """Maps each outcome to the percentage of the n queries that have it."""
    right: np.ndarray
    """Similarity of each query's best right candidate, of shape (n,)."""
    wrong: np.ndarray
    """Similarity of each query's best wrong candidate, the hardest negative, of shape (n,)."""

    @property
    def won(self) -> float:
        """R@1 in percent. A query counts if a right candidate is more similar than every wrong candidate."""
        return 100.0 * float((self.right > self.wrong).mean())


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """All queries, pictures and similarities that the report shows for one split."""

    kind: str
    """Which captions are shown: "sparse" or "dense"."""
    i2t: Direction
    t2i: Direction
    thumbnails: dict[int, str]
    """Maps the position of each shown picture in the split to its JPEG file in base64."""


def make_gallery(
    index: ShardIndex, split: str, embedded: Embeddings, *, kind: str = "sparse", per_outcome: int = 4
) -> Gallery:
    """Chooses queries evenly over the split, up to `per_outcome` for each outcome. Finds their top five answers.

    Args:
        embedded: the embeddings of this split.
        kind: which captions to show, "sparse" or "dense". If the split lacks these, the others are shown.

    Raises:
        ValueError: the split has no captions, or a sample is damaged.
    """
    if getattr(embedded, kind) is None:
        kind = "dense" if kind == "sparse" else "sparse"
    texts = getattr(embedded, kind)
    if texts is None:
        raise ValueError(f"split {split!r} of {index.root} has no caption to show: choose another split")
    rows, reader, owner = index.rows(split), ShardReader(index), texts.owner.cpu()
    first = torch.searchsorted(owner, torch.arange(len(rows)))

    def caption(number: int) -> str:
        image = int(owner[number])
        return getattr(reader.record(rows[image]), kind)[number - int(first[image])]

    def thumbnail(image: int) -> str:
        picture = decode(reader.record(rows[image]).image)
        picture.thumbnail((2 * THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=80)
        return base64.b64encode(buffer.getvalue()).decode()

    images, described = normalize(embedded.images).cpu(), torch.unique(owner)
    captions = _Side(normalize(texts.embeddings).cpu(), owner, caption)
    t2i = _direction(captions, _Side(images, torch.arange(len(images))), per_outcome)
    i2t = _direction(_Side(images[described], described), captions, per_outcome)
    shown = {query.image for query in [*i2t.queries, *t2i.queries]}
    shown |= {answer.image for query in t2i.queries for answer in query.answers}
    thumbnails = {image: thumbnail(image) for image in sorted(shown)}
    return Gallery(kind=kind, i2t=i2t, t2i=t2i, thumbnails=thumbnails)


@dataclass(frozen=True)
class _Side:
    """The queries or the candidates of one direction. They are n pictures or n captions."""

    embeddings: Tensor
    """Normalised embeddings, of shape (n, width)."""
    images: Tensor
    """Positions in the split of the n pictures, or of the n captions' pictures. They are int64, of shape (n,)."""
    text: Callable[[int], str | None] = lambda row: None
    """Returns the caption with the given number, or None for pictures."""


def _direction(queries: _Side, candidates: _Side, per_outcome: int) -> Direction:
    ranks = 1 + retrieval_ranks(
        queries.embeddings, candidates.embeddings, query_ids=queries.images, candidate_ids=candidates.images
    )
    chosen, percent = [], {}
    for outcome, (low, high) in OUTCOMES.items():
        members = torch.nonzero((ranks >= low) & (ranks <= high)).squeeze(1)
        percent[outcome] = 100.0 * len(members) / len(ranks)
        count = min(per_outcome, len(members))
        # Splits the members into `count` equal parts and takes the middle of each part.
        places = ((torch.arange(count) + 0.5) * len(members) / max(count, 1)).long()
        chosen += [
            Query(
                image=int(queries.images[number]),
                text=queries.text(number),
                rank=int(ranks[number]),
                outcome=outcome,
                answers=_answers(queries.embeddings[number], int(queries.images[number]), candidates),
            )
            for number in members[places].tolist()
        ]
    right, wrong = _best_similarities(queries, candidates)
    return Direction(queries=chosen, percent=percent, right=right, wrong=wrong)


def _answers(query: Tensor, image: int, candidates: _Side) -> list[Answer]:
    """Returns the top five candidates, then the best right candidate if it ranks lower. query: shape (width,)."""
    similarity = candidates.embeddings @ query
    right = candidates.images == image
    order = torch.argsort(similarity, descending=True, stable=True)
    places = [*range(min(TOP, len(order)))]
    best = int(torch.nonzero(right[order])[0])
    if best >= TOP:
        places.append(best)
    return [
        Answer(
            image=int(candidates.images[number]),
            text=candidates.text(number),
            similarity=float(similarity[number]),
            right=bool(right[number]),
            rank=place + 1,
        )
        for place in places
        for number in [int(order[place])]
    ]


def _best_similarities(queries: _Side, candidates: _Side) -> tuple[np.ndarray, np.ndarray]:
    """Returns each query's similarity with its best right and its best wrong candidate. Shapes: (queries,)."""
    best_right, best_wrong = [], []
    for start in range(0, len(queries.embeddings), _CHUNK):
        similarity = queries.embeddings[start : start + _CHUNK] @ candidates.embeddings.T
        right = queries.images[start : start + _CHUNK].unsqueeze(1) == candidates.images
        best_right.append(similarity.masked_fill(~right, -torch.inf).amax(1))
        best_wrong.append(similarity.masked_fill(right, -torch.inf).amax(1))
    return torch.cat(best_right).numpy(), torch.cat(best_wrong).numpy()
