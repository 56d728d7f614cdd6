"""How samples become batches: the settings."""

from dataclasses import dataclass
from typing import Literal


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
