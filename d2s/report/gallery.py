"""What the report shows of a model at work: queries with their top five, and similarities of pairs."""

import base64
import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from d2s.evaluate.embed import Embeddings
from d2s.evaluate.metrics import normalize
from d2s.kernels import retrieval_ranks
from d2s.preprocess.images import decode
from d2s.shards.read.index import ShardIndex
from d2s.shards.read.reader import ShardReader

TOP = 5
THUMB = 160
_CHUNK = 1024
# What a query came to, by the 0-based rank of its best right answer.
OUTCOMES = (("hit", 0, 1), ("near", 1, TOP), ("miss", TOP, 1 << 62))


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One candidate; `text` is None where the candidate is a picture. `image` is its position in the split."""

    image: int
    text: str | None
    similarity: float
    right: bool
    rank: int
    """From 1, as listed."""


@dataclass(frozen=True, kw_only=True)
class Query:
    """A query with its best answers; `text` is None where the query is a picture."""

    image: int
    text: str | None
    rank: int
    """Of the best right answer, from 1; ties count against the model."""
    outcome: str
    """hit (rank 1), near (2 to 5), or miss."""
    answers: list[Answer]
    best: Answer
    """The best right answer, wherever it stands."""


@dataclass(frozen=True, kw_only=True)
class Direction:
    """The gallery of one direction."""

    queries: list[Query]
    shares: dict[str, float]
    """Of all queries of the split, in percent, by outcome."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Similarities over all queries of one direction."""

    positive: np.ndarray
    """(n,) the best right candidate's."""
    hardest: np.ndarray
    """(n,) the best wrong candidate's."""

    @property
    def won(self) -> float:
        """Percent of queries whose best right candidate lies strictly before every wrong one: R@1."""
        return 100.0 * float((self.positive > self.hardest).mean())


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Everything that the report shows of one split."""

    kind: str
    """Which captions: sparse or dense."""
    i2t: Direction
    t2i: Direction
    i2t_pairs: Pairs
    t2i_pairs: Pairs
    thumbs: dict[int, str]
    """Base64 JPEG by position in the split, for every picture that is shown."""


def make_gallery(
    index: ShardIndex, split: str, embedded: Embeddings, *, kind: str = "sparse", per_outcome: int = 4
) -> Gallery:
    """Chooses queries evenly over the split, so many of each outcome, and finds their top five.

    Args:
        embedded: of this split.
        kind: which captions to show, "sparse" or "dense"; the other where the split has none of them.

    Raises:
        ValueError: the split has no captions, or a sample is damaged.
    """
    if getattr(embedded, kind) is None:
        kind = "dense" if kind == "sparse" else "sparse"
    texts = getattr(embedded, kind)
    if texts is None:
        raise ValueError(f"split {split!r} of {index.root} has no caption to show: choose another split")
    images, captions = normalize(embedded.images).cpu(), normalize(texts.embeddings).cpu()
    owner = texts.owner.cpu()
    asked = torch.nonzero(torch.bincount(owner, minlength=len(images))).squeeze(1)
    everyone = torch.arange(len(images))
    words = _Captions(index, split, kind, owner)
    i2t = _direction(images[asked], captions, asked, owner, per_outcome, words, pictures=False)
    t2i = _direction(captions, images, owner, everyone, per_outcome, words, pictures=True)
    shown = {answer.image for query in t2i.queries for answer in [*query.answers, query.best]}
    shown |= {query.image for query in [*i2t.queries, *t2i.queries]}
    return Gallery(
        kind=kind,
        i2t=i2t,
        t2i=t2i,
        i2t_pairs=_pairs(images[asked], captions, asked, owner),
        t2i_pairs=_pairs(captions, images, owner, everyone),
        thumbs={position: words.thumb(position) for position in sorted(shown)},
    )


class _Captions:
    """Captions and pictures by position, read from the shards only when asked for."""

    def __init__(self, index: ShardIndex, split: str, kind: str, owner: Tensor) -> None:
        self._rows, self._kind = index.rows(split), kind
        self._reader = ShardReader(index)
        self._first = torch.searchsorted(owner, torch.arange(len(self._rows)))

    def text(self, caption: int, image: int) -> str:
        record = self._reader.record(self._rows[image])
        return getattr(record, self._kind)[caption - int(self._first[image])]

    def thumb(self, image: int) -> str:
        picture: Image.Image = decode(self._reader.record(self._rows[image]).image)
        picture.thumbnail((2 * THUMB, THUMB))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=80)
        return base64.b64encode(buffer.getvalue()).decode()


def _direction(
    queries: Tensor,
    candidates: Tensor,
    query_ids: Tensor,
    candidate_ids: Tensor,
    per_outcome: int,
    words: _Captions,
    *,
    pictures: bool,
) -> Direction:
    """pictures: the candidates are images and the queries captions; else the other way round."""
    ranks = retrieval_ranks(queries, candidates, query_ids=query_ids, candidate_ids=candidate_ids)
    chosen, shares = [], {}
    for outcome, low, high in OUTCOMES:
        members = torch.nonzero((ranks >= low) & (ranks < high)).squeeze(1)
        shares[outcome] = 100.0 * len(members) / len(ranks)
        count = min(per_outcome, len(members))
        # The middle of each of `count` equal parts: spread over the split, and not picked by anybody.
        places = ((torch.arange(count) + 0.5) * len(members) / max(count, 1)).long()
        chosen += [(int(q), outcome) for q in members[places]]
    found = []
    for number, outcome in chosen:
        similarity = candidates @ queries[number]
        image = int(query_ids[number])
        right = candidate_ids == image
        order = torch.argsort(similarity, descending=True, stable=True)
        best = int(torch.argmax(similarity.masked_fill(~right, -torch.inf)))
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))

        def answer(candidate: int, similarity=similarity, right=right, place=place) -> Answer:
            at = int(candidate_ids[candidate])
            return Answer(
                image=at,
                text=None if pictures else words.text(candidate, at),
                similarity=float(similarity[candidate]),
                right=bool(right[candidate]),
                rank=int(place[candidate]) + 1,
            )

        found.append(
            Query(
                image=image,
                text=words.text(number, image) if pictures else None,
                rank=int(ranks[number]) + 1,
                outcome=outcome,
                answers=[answer(int(candidate)) for candidate in order[:TOP]],
                best=answer(best),
            )
        )
    return Direction(queries=found, shares=shares)


def _pairs(queries: Tensor, candidates: Tensor, query_ids: Tensor, candidate_ids: Tensor) -> Pairs:
    positive, hardest = [], []
    for start in range(0, len(queries), _CHUNK):
        similarity = queries[start : start + _CHUNK] @ candidates.T
        right = query_ids[start : start + _CHUNK].unsqueeze(1) == candidate_ids
        positive.append(similarity.masked_fill(~right, -torch.inf).amax(1))
        hardest.append(similarity.masked_fill(right, -torch.inf).amax(1))
    return Pairs(positive=torch.cat(positive).numpy(), hardest=torch.cat(hardest).numpy())
