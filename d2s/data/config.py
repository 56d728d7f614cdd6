"""Settings of the loader: how samples become batches."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from d2s.common.settings import Settings, settings

Length = Annotated[int, Field(ge=4)]
Probability = Annotated[float, Field(ge=0, le=1)]


@settings("data")
class DataConfig(Settings):
    """How samples become batches. Data set, split, batch size and seed are given elsewhere."""

    image_size: PositiveInt = 224
    """Side of the square input in pixels."""
    sparse: Literal["all", "one"] = "all"
    """An epoch visits every (image, sparse caption) pair, or every image once with one caption drawn."""
    dense: Literal["whole", "sentences"] = "whole"
    """A dense caption is used whole, or as a random subset of its sentences in their order (training only)."""
    max_words_sparse: Length = 64
    """Longest sparse caption in tokens, special tokens included; longer ones are cut and counted."""
    max_words_dense: Length = 256
    """Longest dense caption in tokens, special tokens included."""
    crop_min: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Smallest side ratio of a random crop; 1 switches cropping off."""
    flip: Probability = 0.5
    """Probability of a left-right flip."""
    word_augment: Probability = 0.2
    """Probability that a word is masked, replaced or deleted; 0 switches it off."""
    order: Literal["rows", "blocks"] = "rows"
    """Samples in a random order over the whole split, or mixed within blocks of shards, for slow random reads."""
    block_shards: PositiveInt = 8
    """Shards in a block, where order is "blocks"."""
    loader_workers: NonNegativeInt = 2
    """Loader processes of each worker; 0 loads in the training process. Batches do not depend on it."""
    damage_budget: NonNegativeInt = 100
    """Damaged samples, each counted once, that a run replaces before it stops."""
