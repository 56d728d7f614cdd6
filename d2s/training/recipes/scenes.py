"""Recipes for procedural scenes, whose captions are generated with them."""

from functools import partial

from d2s.model import presets
from d2s.training.config import TrainConfig
from d2s.training.recipes.paper import Stage
from d2s.training.recipes.small import small


def _small(stage: Stage, *, steps: int) -> TrainConfig:
    """Scenes at 64 pixels; both towers start from random weights.

    The captions name sides and corners, which a flip or a narrow crop would make false.
    """
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
