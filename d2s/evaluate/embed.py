"""Embeds each image and each caption of a split once, on one worker or on several.

All workers process the same number of batches. If there are too few items, surplus rows fill the batches.
Afterwards all workers gather all rows in the split's order. So the result does not depend on the number of
workers or on the batch size.
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
    """Holds embeddings of the M sparse captions or of the M dense captions of a split. D is the width."""

    embeddings: Tensor
    """float32, of shape (M, D), not scaled to length 1."""
    owner: Tensor
    """int64, of shape (M,), ascending. Entry j is the position of caption j's image in the split."""
    truncated: int
    """Number of captions that were cut, because they had too many word pieces."""


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """Holds the embeddings of a split with N images. All workers hold the same. D is the width."""

    images: Tensor
    """float32, of shape (N, D), in the order of the split's rows."""
    sparse: TextSet | None
    """Sparse captions. None if the split has none."""
    dense: TextSet | None
    """Dense captions. None if the split has none, or if `embed_split` got `dense=False`."""


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

    All workers must call this together. Each worker gets all embeddings.

    Args:
        config: image size and limits of word pieces.
        batch_size: number of images or captions in a batch of one worker.
        dense: if False, only images and sparse captions are embedded.
        poll: function that is called before each batch, for example to check for stop signals. All workers
            call it the same number of times. An exception that it raises ends the embedding.

    Raises ValueError if the split does not exist or is empty, or if a sample is damaged.
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
            # This process reads the captions, so that `pipeline.truncated` counts the cut captions here.
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
    """Embeds captions that `pipeline` encoded. counts: int64, number of captions of each image."""
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
    """Gathers the rows of all workers and sorts them by place. Returns a tensor of shape (total, D).

    parts, places: for each batch, its rows and their places. Surplus rows have place -1 and are left out.
    """
    rows, place = all_gather(torch.cat(parts)), all_gather(torch.cat(places).to(parts[0].device))
    real = place >= 0
    assert int(real.sum()) == total, "an item was embedded twice or not at all"
    out = rows.new_empty(total, rows.shape[1])
    out[place[real]] = rows[real]
    return out
