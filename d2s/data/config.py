"""Settings that decide how batches are built from samples."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from d2s.common.settings import Settings, settings

Length = Annotated[int, Field(ge=4)]
Probability = Annotated[float, Field(ge=0, le=1)]


@settings("data")
class DataConfig(Settings):
    """How batches are built from samples. Data set, split, batch size and seed are set elsewhere."""

    image_size: PositiveInt = 224
    """Side of the square input image in pixels."""
    sparse: Literal["all", "one"] = "all"
    """all: an epoch visits each image once for each of its sparse captions. one: once, with a random one of them."""
    dense: Literal["whole", "sentences"] = "whole"
    """whole: use the whole dense caption. sentences: in training, use random sentences of the caption, in order."""
    max_words_sparse: Length = 64
    """Maximum tokens of a sparse caption, with special tokens. Longer captions are cut, and counted in the log."""
    max_words_dense: Length = 256
    """Maximum tokens of a dense caption, with special tokens. Longer captions are cut, and counted in the log."""
    crop_min: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Smallest side of a random crop, as a fraction of the image's side; 1 switches cropping off."""
    flip: Probability = 0.5
    """Probability of a left-right flip."""
    word_augment: Probability = 0.2
    """Probability that a word is masked, replaced or deleted; 0 switches it off."""
    order: Literal["rows", "blocks"] = "rows"
    """rows: shuffle the whole split. blocks: shuffle within blocks of shards, for storage with slow random reads."""
    block_shards: PositiveInt = 8
    """Number of shards in a block, if data.order is "blocks"."""
    loader_workers: NonNegativeInt = 2
    """Number of loader processes of each worker; 0 loads in the training process. It does not change the batches."""
    damage_budget: NonNegativeInt = 100
    """How many different damaged samples a run may replace. The run stops if there are more."""
