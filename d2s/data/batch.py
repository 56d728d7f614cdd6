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
    """uint8 (B, 3, H, W). H and W are both image_size."""
    text_ids: torch.Tensor
    """int64 (B, L): tokens of the caption to align, after augmentation; dense in the pretrain stage, else sparse."""
    text_mask: torch.Tensor
    """bool (B, L): True at tokens, False at padding."""
    dense_ids: torch.Tensor | None = None
    """int64 (B, K): tokens of the dense caption for an online teacher, not augmented; None without such a teacher."""
    dense_mask: torch.Tensor | None = None
    """bool (B, K): True at tokens, False at padding."""
    image_ids: torch.Tensor
    """int64 (B,): an image and a caption with the same id are never a negative pair."""
    samples: torch.Tensor
    """int64 (B,): the row of each image in the data set's index; -1 in a stream."""
    dense_index: torch.Tensor
    """int64 (B,): number of the dense caption in the data set, to find its row in the teacher table; -1 if none."""
    draw_seeds: torch.Tensor
    """int64 (B,): a random seed for each sample, used for random draws inside the model."""
    damaged: list[str] = field(default_factory=list)
    """A message for each damaged sample that was replaced."""
    truncated: int = 0
    """How many captions were cut to the maximum length."""

    def __len__(self) -> int:
        return len(self.images)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **{name: function(tensor) for name, tensor in tensors.items()})

    def rows(self, start: int, stop: int) -> "Batch":
        """Returns the pairs start .. stop - 1 as views, with `damaged` and `truncated` of the whole batch."""
        return self._map(lambda tensor: tensor[start:stop])

    def to(self, device: torch.device | str) -> "Batch":
        """Returns a copy of the batch on `device`. Copies from pinned memory are asynchronous."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Returns a copy of the batch in pinned memory. The DataLoader calls this method."""
        return self._map(torch.Tensor.pin_memory)


class BatchBuilder:
    """Builds batches from records and images. Each random draw depends only on seed, epoch and item.

    Args:
        config: image, text, order and loading settings.
        pipeline: turns captions into tokens.
        captions: which captions to align with images, "sparse" or "dense". "both" aligns sparse captions and adds a
            dense caption of the same image for the teacher.
        seed: decides the order of the samples and all random draws.
        dense_text: with "both", whether a batch holds the dense caption's tokens. A teacher with stored embeddings
            needs only the caption's number in the data set.
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
        """Builds a batch from B records, their images (B, 3, H, W) and the items (B,) that seed the random draws.

        sparse: (B,), index of the caption to take from each record's sparse captions. samples, damaged: as in Batch.
        dense_start: (B,), the number in the data set of each record's first dense caption; None in a stream.
        """
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
    """Returns a random integer in 0 .. counts[i] - 1 for each item i, int64 (B,). `stream` names the kind of draw."""
    return (draws.uniform(seed, epoch, items, stream)[:, 0] * counts).astype(np.int64)


def random_sentences(text: str, seed: int, epoch: int, item: int) -> str:
    """Returns some randomly chosen sentences of `text`, in their order. Their number is random too, at least one."""
    sentences = _SENTENCE_END.split(text.strip())
    if len(sentences) == 1:
        return text
    draw = draws.uniform(seed, epoch, [int(item)], "sentences", len(sentences) + 1)[0]
    count = 1 + int(draw[0] * len(sentences))
    return " ".join(sentences[i] for i in np.sort(np.argsort(draw[1:])[:count]))
