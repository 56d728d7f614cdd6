"""Defines a training batch, and builds batches from records."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from d2s.data.config import DataConfig
from d2s.preprocess.text import TextPipeline
from d2s.shards.order import draws
from d2s.shards.read.records import Record

I64 = NDArray[np.int64]
Captions = Literal["sparse", "dense", "both"]
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(kw_only=True)
class Batch:
    """One worker's part of a global batch: B pairs of an image and a caption."""

    images: torch.Tensor
    """Images, uint8 of shape (B, 3, H, W). H and W are both `DataConfig.image_size`."""
    text_ids: torch.Tensor
    """Tokens of the captions to align, augmented. They are dense captions in the pretrain stage, else sparse ones.
    int64, of shape (B, L)."""
    text_mask: torch.Tensor
    """True at tokens, False at padding. Boolean, of shape (B, L)."""
    dense_ids: torch.Tensor | None = None
    """Tokens of the dense captions, not augmented, int64 of shape (B, K). None if no online teacher reads them."""
    dense_mask: torch.Tensor | None = None
    """True at tokens of `dense_ids`, False at padding. Boolean, of shape (B, K)."""
    image_ids: torch.Tensor
    """Image ids, int64 of shape (B,). An image and a caption with the same id are never a negative pair."""
    samples: torch.Tensor
    """The row of each image in the data set's index, int64 of shape (B,). -1 in a stream."""
    dense_index: torch.Tensor
    """The number of each dense caption in the data set, to find its row in the teacher table. int64, of shape (B,).
    -1 for no dense caption."""
    draw_seeds: torch.Tensor
    """A random seed for each sample, int64 of shape (B,). The model seeds its random draws with it."""
    damaged: list[str] = field(default_factory=list)
    """A message about each damaged sample that was replaced by another sample."""
    truncated: int = 0
    """How many captions were cut to the maximum length."""

    def __len__(self) -> int:
        return len(self.images)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **{name: function(tensor) for name, tensor in tensors.items()})

    def rows(self, start: int, stop: int) -> "Batch":
        """Returns the pairs start .. stop - 1 as a batch of views. It keeps `damaged` and `truncated` unchanged."""
        return self._map(lambda tensor: tensor[start:stop])

    def to(self, device: torch.device | str) -> "Batch":
        """Returns a copy of the batch on `device`. Copies from pinned memory are asynchronous."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Returns a copy of the batch in pinned memory. The DataLoader calls this method."""
        return self._map(torch.Tensor.pin_memory)


class BatchBuilder:
    """Builds batches from records and images. Each random draw depends only on seed, epoch and item (see batches.py).

    Args:
        config: image, text, order and loading settings.
        pipeline: turns captions into tokens.
        captions: which captions to align with images, "sparse" or "dense". "both" aligns sparse captions and adds a
            dense caption of the same image for the teacher.
        seed: decides the order of the samples and all random draws.
        dense_text: if `captions` is "both", whether batches contain tokens of dense captions. A teacher with stored
            embeddings needs only the number of a dense caption in the data set.
    """

    def __init__(
        self,
        config: DataConfig,
        pipeline: TextPipeline,
        *,
        captions: Captions,
        seed: int,
        dense_text: bool = True,
    ) -> None:
        self.config, self.pipeline, self.captions = config, pipeline, captions
        self.seed, self.dense_text = seed, dense_text

    def build(
        self,
        records: Sequence[Record],
        images: NDArray[np.uint8],
        items: I64,
        epoch: int,
        *,
        sparse: I64,
        samples: I64,
        dense_start: I64 | None,
        damaged: list[str],
    ) -> Batch:
        """Builds a batch from B records. `images` has shape (B, 3, H, W), all other arrays have shape (B,).
        items: the item numbers, which seed the random draws. sparse: which of its sparse captions to take from each
        record. samples, damaged: as in :class:`Batch`. dense_start: the number in the data set of each record's
        first dense caption; None in a stream."""
        config, seed, cut_before = self.config, self.seed, self.pipeline.truncated
        dense_index, long = np.full(len(records), -1), []
        if self.captions != "sparse":
            n_dense = np.array([len(record.dense) for record in records])
            dense = draw_one(n_dense, seed, epoch, items, "dense")
            long = [record.dense[j] for record, j in zip(records, dense, strict=True)]
            if dense_start is not None:
                dense_index = dense_start + dense
        if self.captions != "dense":
            texts = [r.sparse[j] for r, j in zip(records, sparse, strict=True)]
            max_length = config.max_words_sparse
        else:
            texts, max_length = long, config.max_words_dense
            if config.dense == "sentences":
                texts = [random_sentences(t, seed, epoch, i) for t, i in zip(long, items, strict=True)]
        ids, mask = self.pipeline.augment(
            texts, seed, epoch, items, word_augment=config.word_augment, max_length=max_length
        )
        dense_ids = dense_mask = None
        if self.captions == "both" and self.dense_text:
            dense_ids, dense_mask = self.pipeline.encode(long, config.max_words_dense)
        return Batch(
            images=torch.from_numpy(images),
            text_ids=ids,
            text_mask=mask,
            dense_ids=dense_ids,
            dense_mask=dense_mask,
            image_ids=torch.tensor([record.image_id for record in records], dtype=torch.int64),
            samples=torch.from_numpy(samples.astype(np.int64)),
            dense_index=torch.from_numpy(dense_index.astype(np.int64)),
            draw_seeds=torch.from_numpy(draws.bits(seed, epoch, items, "tokens")[:, 0].astype(np.int64)),
            damaged=damaged,
            truncated=self.pipeline.truncated - cut_before,
        )


def draw_one(counts: I64, seed: int, epoch: int, items: I64, stream: str) -> I64:
    """Returns a random integer from 0 to counts[i] - 1 for each items[i]. All arrays are int64, of shape (B,).
    stream: name of the purpose, such as "caption". Draws for different purposes are independent."""
    return (draws.uniform(seed, epoch, items, stream)[:, 0] * counts).astype(np.int64)


def random_sentences(text: str, seed: int, epoch: int, item: int) -> str:
    """Returns a random number of randomly chosen sentences of `text`, at least one, in their original order."""
    sentences = _SENTENCE_END.split(text.strip())
    if len(sentences) == 1:
        return text
    draw = draws.uniform(seed, epoch, [int(item)], "sentences", len(sentences) + 1)[0]
    count = 1 + int(draw[0] * len(sentences))
    return " ".join(sentences[i] for i in np.sort(np.argsort(draw[1:])[:count]))
