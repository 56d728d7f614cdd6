"""Embeds a split with a model: every image once, every caption once, on one worker or on many.

Each worker takes the same number of steps; filler rows are masked. The parts are gathered and put in their
places by number, so the result depends neither on the number of workers nor on the batch size.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from d2s.data.config import DataConfig
from d2s.data.eval_batches import eval_images, eval_texts
from d2s.model import D2SModel
from d2s.preprocess.text import TextPipeline
from d2s.shards.read.index import ShardIndex
from d2s.workers.collectives import all_gather

Kind = Literal["sparse", "dense"]
Poll = Callable[[], None] | None
Rows = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class TextSet:
    """The embeddings of all captions of one kind in a split. M captions, D width."""

    embeddings: Tensor
    """(M, D) float32, as the model gives them: not normalised."""
    owner: Tensor
    """(M,) int64: position of the caption's image in the split, 0..N-1, ascending."""
    truncated: int
    """Captions that were longer than the limit of word pieces, and cut."""


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """A split, embedded; the same on every worker. N images, D width."""

    images: Tensor
    """(N, D) float32 in the order of the split's rows."""
    sparse: TextSet | None
    """None where the split has no sparse captions."""
    dense: TextSet | None
    """None where the split has no dense captions, or they were not asked for."""


@torch.no_grad()
def embed_split(
    model: D2SModel,
    index: ShardIndex,
    split: str,
    *,
    config: DataConfig,
    batch_size: int = 128,
    rank: int = 0,
    world: int = 1,
    dense: bool = True,
    poll: Poll = None,
) -> Embeddings:
    """Embeds a split in evaluation mode; afterwards the model is again in the mode in which it came.

    With several workers all of them must call this together, and each gets everything: (N + M) x D numbers.

    Args:
        config: image size and limits of word pieces.
        batch_size: images or captions a worker and step.
        dense: dense captions too, where the split has any.
        poll: called before each batch, of which every worker has the same number; may raise.

    Raises:
        ValueError: no such split, an empty one, or a damaged sample (an evaluation replaces none).
    """
    training = model.training
    model.eval()
    try:
        images = _embed_images(model, index, split, config, batch_size, rank, world, poll)
        sets: dict[Kind, TextSet | None] = {"sparse": None, "dense": None}
        for kind in ("sparse", "dense") if dense else ("sparse",):
            if index.total(split, kind):
                sets[kind] = _embed_texts(model, index, split, kind, config, batch_size, rank, world, poll)
    finally:
        model.train(training)
    return Embeddings(images=images, sparse=sets["sparse"], dense=sets["dense"])


def _polled(batches: Iterable[Rows], poll: Poll) -> Iterator[Rows]:
    """Passes batches on, and asks before each whether to go on."""
    for batch in batches:
        if poll:
            poll()
        yield batch


def _embed_images(
    model: D2SModel,
    index: ShardIndex,
    split: str,
    config: DataConfig,
    batch_size: int,
    rank: int,
    world: int,
    poll: Poll,
) -> Tensor:
    device = next(model.parameters()).device
    start = index.rows(split).start
    parts, numbers = [], []
    for rows, images, _ in _polled(eval_images(index, split, config, batch_size, rank, world), poll):
        parts.append(model.forward_image(images.to(device)).float())
        numbers.append(torch.where(rows < 0, -1, rows - start))
    return _put_together(parts, numbers, len(index.rows(split)))


def _embed_texts(
    model: D2SModel,
    index: ShardIndex,
    split: str,
    kind: Kind,
    config: DataConfig,
    batch_size: int,
    rank: int,
    world: int,
    poll: Poll,
) -> TextSet:
    device = next(model.parameters()).device
    limit = config.max_words_sparse if kind == "sparse" else config.max_words_dense
    limit = min(limit, model.max_words)
    pipeline = TextPipeline(model.tokenizer, limit)
    total = index.total(split, kind)
    parts, numbers, truncated = [], [], 0
    # Read in this process: the pipeline counts the cut captions, and captions are quick to read.
    batches = eval_texts(index, split, pipeline, kind, batch_size, rank, world)
    for which, _, ids, mask, valid in _polled(batches, poll):
        parts.append(model.forward_text(ids.to(device), mask.to(device)).embedding.float())
        numbers.append(which)
        filler = ~valid & (mask.sum(1) == limit)
        # Filler repeats the last caption, and was counted as often as that one was cut.
        truncated += max(0, pipeline.truncated - int(filler.sum()))
        pipeline.truncated = 0
    counts = index.column(f"n_{kind}")[index.rows(split).start : index.rows(split).stop]
    owner = torch.repeat_interleave(torch.from_numpy(counts.astype("int64")))
    cut = all_gather(torch.tensor([truncated], device=device)) if world > 1 else torch.tensor([truncated])
    return TextSet(
        embeddings=_put_together(parts, numbers, total), owner=owner.to(device), truncated=int(cut.sum())
    )


def _put_together(parts: list[Tensor], numbers: list[Tensor], total: int) -> Tensor:
    """Rows of all workers (each the same number) at the places that `numbers` names; -1 is filler.

    Returns (total, D).
    """
    rows, places = torch.cat(parts), torch.cat(numbers).to(parts[0].device)
    rows, places = all_gather(rows), all_gather(places)
    real = places >= 0
    assert int(real.sum()) == total, "an item was embedded twice or not at all"
    whole = rows.new_empty(total, rows.shape[1])
    whole[places[real]] = rows[real]
    return whole
