"""Recipes for procedural scenes: images of shapes that are generated together with their captions."""

from functools import partial

from d2s.model import presets
from d2s.training.config import TrainConfig
from d2s.training.recipes.paper import Stage
from d2s.training.recipes.small import small


def _small(stage: Stage, *, steps: int) -> TrainConfig:
    """Returns a small configuration for 64-pixel scenes. Both towers start from random weights.
    There are no flips and no narrow crops. They would make captions false that name sides and corners of the image.
    steps: number of training steps."""
    return small(
        stage,
        steps=steps,
        size=64,
        image=presets.small_resnet((32, 64, 128)),
        text=presets.small_bert(),
        model={"width": 128},
        data={"max_words_dense": 128, "crop_min": 0.9, "flip": 0.0},
    )


scenes_small_pretrain = partial(_small, "pretrain", steps=200)
scenes_small_finetune = partial(_small, "finetune", steps=100)
scenes_small_align = partial(_small, "align", steps=300)
