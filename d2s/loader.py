"""What a batch is, how loading is configured, and how worker processes are run."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How samples become batches. The data set's folder, the split, the batch and the seed are given apart."""

    image_size: int = 224
    """Side of the square input in pixels."""
    sparse: Literal["all", "one"] = "all"
    """An epoch is all (image, sparse caption) pairs, or each image once with one caption drawn."""
    dense: Literal["whole", "sentences"] = "whole"
    """A dense caption is used whole, or as a random subset of its sentences in their order (training only)."""
    max_words_sparse: int = 64
    """Positions of a sparse caption at most, special tokens included; a longer one is cut and counted."""
    max_words_dense: int = 256
    """Positions of a dense caption at most."""
    crop_min: float = 0.6
    """Smallest side ratio of a random crop; 1 switches cropping off."""
    flip: float = 0.5
    """Probability of a left-right flip."""
    word_augment: float = 0.2
    """Probability that a word is masked, replaced or deleted; 0 switches it off."""
    order: Literal["rows", "blocks"] = "rows"
    """Samples in a random order over the whole split, or mixed within blocks of shards, for slow random reads."""
    block_shards: int = 8
    """Shards in a block, where order is "blocks"."""
    loader_workers: int = 2
    """Worker processes of each rank that load; 0 loads in the training process. Batches do not depend on it."""
    damage_budget: int = 100
    """Damaged samples, each counted once, that a run replaces before it stops."""

    def __post_init__(self) -> None:
        choices = {"sparse": ("all", "one"), "dense": ("whole", "sentences"), "order": ("rows", "blocks")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: use {allowed[0]!r} or {allowed[1]!r}")
        lowest = {
            "image_size": 1,
            "max_words_sparse": 4,
            "max_words_dense": 4,
            "block_shards": 1,
            "loader_workers": 0,
            "damage_budget": 0,
        }
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: use at least {least}")
        if not 0 < self.crop_min <= 1:
            raise ValueError(f"crop_min is {self.crop_min}: use a ratio above 0 and at most 1")
        for name in ("flip", "word_augment"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: use a probability from 0 to 1")


@dataclass(kw_only=True)
class Batch:
    """One worker's part of a global batch; B pairs of an image and a caption."""

    images: torch.Tensor
    """uint8 (B, 3, H, W), H = W = image_size."""
    text_ids: torch.Tensor
    """int64 (B, L): the caption to align, augmented; sparse, or dense where captions is "dense"."""
    text_mask: torch.Tensor
    """bool (B, L), True at real tokens."""
    dense_ids: torch.Tensor | None = None
    """int64 (B, K): the clean dense caption for the teacher, or None."""
    dense_mask: torch.Tensor | None = None
    """bool (B, K)."""
    image_ids: torch.Tensor
    """int64 (B,): captions of images with the same id are never negatives of each other."""
    samples: torch.Tensor
    """int64 (B,): global rows."""
    dense_index: torch.Tensor
    """int64 (B,): number of the dense caption in the whole data set (a teacher cache's row); -1 where none."""
    draw_seeds: torch.Tensor
    """int64 (B,): 64 bits of each sample's own for random draws inside the model."""
    damaged: list[str] = field(default_factory=list)
    """One line for each sample that was replaced."""
    truncated: int = 0
    """Captions that were cut."""

    def __len__(self) -> int:
        return len(self.images)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{k: function(v) if isinstance(v, torch.Tensor) else v for k, v in values.items()})

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device; copies from pinned memory do not block."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The batch in pinned memory (called by the DataLoader)."""
        return self._map(torch.Tensor.pin_memory)


class _Plan:
    """A sampler whose content is set anew for each epoch, so that worker processes live through all of them."""

    def __init__(self) -> None:
        self.items: Sequence[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


class StepLoader:
    """Runs `dataset[item]` for a list of items in worker processes; results come in the list's order.

    An item names a whole batch, so what a batch holds cannot depend on the number of processes.
    """

    def __init__(self, dataset: Dataset, workers: int) -> None:
        self._plan = _Plan()
        self._loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=self._plan,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def run(self, items: Sequence[Any]) -> Iterator[Any]:
        """Yields dataset[item] for each item. A second run ends the first."""
        if items:
            self._plan.items = items
            yield from self._loader
