"""Embeds each image and each caption of a split once, on one worker or on several.

All workers process equally many batches, filled up with surplus rows. All rows are gathered and sorted into
the split's order, so the result does not depend on the number of workers or the batch size.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from d2s.data.config import DataConfig
from d2s.data.eval_batches import eval_images, eval_texts
from d2s.model import D2SModel
from d2s.model.d2s_model import evaluating
from d2s.preprocess.text import TextPipeline
from d2s.shards.read.index import ShardIndex
from d2s.workers.collectives import all_gather
from d2s.workers.group import rank, world_size


@dataclass(frozen=True, kw_only=True)
class TextSet:
    """The embeddings of all sparse or of all dense captions in a split. Sizes: M captions, D width."""

    embeddings: Tensor
    """(M, D) float32, not normalised."""
    owner: Tensor
    """(M,) int64, ascending: position in the split, 0..N-1, of each caption's image."""
    truncated: int
    """How many captions were cut at the limit of word pieces."""


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """The embeddings of a split, the same on every worker. Sizes: N images, D width."""

    images: Tensor
    """(N, D) float32, in the order of the split's rows."""
    sparse: TextSet | None
    """None if the split has no sparse captions."""
    dense: TextSet | None
    """None if the split has no dense captions, or they were not requested."""


@torch.no_grad()
def embed_split(
    model: D2SModel,
    index: ShardIndex,
    split: str,
    *,
    config: DataConfig,
    batch_size: int = 128,
    dense: bool = True,
    poll: Callable[[], None] | None = None,
) -> Embeddings:
    """Embeds a split in eval mode. Afterwards the model is in its previous mode.

    All workers must call this together. Each worker gets all (N + M) x D numbers.

    Args:
        config: image size and limits of word pieces.
        batch_size: number of images or captions in a batch of one worker.
        dense: whether to embed also dense captions, if the split has any.
        poll: called before each batch, equally often on every worker; an exception in it ends the embedding.

    Raises:
        ValueError: the split does not exist or is empty, or a sample is damaged.
    """

    def polled(batches: Iterable[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
        for batch in batches:
            if poll:
                poll()
            yield batch

    rows, worker = index.rows(split), (rank(), world_size())
    with evaluating(model):
        batches = polled(eval_images(index, split, config, batch_size, *worker))
        images = _embed_images(model, batches, rows)
        sets: dict[str, TextSet] = {}
        for kind in ("sparse", "dense") if dense else ("sparse",):
            if not index.total(split, kind):
                continue
            limit = config.max_words_sparse if kind == "sparse" else config.max_words_dense
            pipeline = TextPipeline(model.tokenizer, min(limit, model.max_words))
            # Captions are read in this process, so that the pipeline can count the captions that it cuts.
            batches = polled(eval_texts(index, split, pipeline, kind, batch_size, *worker))
            counts = torch.from_numpy(index.column(f"n_{kind}")[rows.start : rows.stop].astype("int64"))
            sets[kind] = _embed_texts(model, batches, pipeline, counts)
    return Embeddings(images=images, sparse=sets.get("sparse"), dense=sets.get("dense"))


def _embed_images(model: D2SModel, batches: Iterator[tuple[Tensor, ...]], split_rows: range) -> Tensor:
    parts, places = [], []
    for rows, images, _ in batches:
        parts.append(model.forward_image(images.to(model.device)).float())
        places.append(torch.where(rows < 0, -1, rows - split_rows.start))
    return _in_order(parts, places, len(split_rows))


def _embed_texts(
    model: D2SModel, batches: Iterator[tuple[Tensor, ...]], pipeline: TextPipeline, counts: Tensor
) -> TextSet:
    """Embeds captions that `pipeline` encoded. counts: (N,) int64, captions of each image."""
    parts, places = [], []
    for numbers, _, ids, mask, _ in batches:
        parts.append(model.forward_text(ids.to(model.device), mask.to(model.device)).embedding.float())
        places.append(numbers)
    return TextSet(
        embeddings=_in_order(parts, places, int(counts.sum())),
        owner=torch.repeat_interleave(counts).to(model.device),
        truncated=int(all_gather(torch.tensor([pipeline.truncated], device=model.device)).sum()),
    )


def _in_order(parts: list[Tensor], places: list[Tensor], total: int) -> Tensor:
    """Gathers all workers' rows, sorted by place 0..total-1: (total, D). Surplus rows have place -1."""
    rows, place = all_gather(torch.cat(parts)), all_gather(torch.cat(places).to(parts[0].device))
    real = place >= 0
    assert int(real.sum()) == total, "an item was embedded twice or not at all"
    out = rows.new_empty(total, rows.shape[1])
    out[place[real]] = rows[real]
    return out
