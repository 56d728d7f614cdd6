"""Flickr8k recipes."""

from functools import partial

from d2s.model import presets
from d2s.training.config import TrainConfig
from d2s.training.recipes.paper import Stage
from d2s.training.recipes.small import small


def _small(stage: Stage, *, steps: int) -> TrainConfig:
    """Returns a small configuration for 112-pixel photographs. The text tower is a frozen MiniLM with trained heads.
    Words are not masked, because MiniLM never saw [MASK]. There is no dropout, because a short run does not overfit.
    steps: number of training steps."""
    return small(
        stage,
        steps=steps,
        size=112,
        image=presets.small_resnet(),
        text=presets.minilm(),
        model={"width": 256, "text_dropout": 0.0, "token_dropout": 0.0},
        data={"max_words_dense": 112, "word_augment": 0.0},
    )


flickr8k_small_pretrain = partial(_small, "pretrain", steps=200)
flickr8k_small_finetune = partial(_small, "finetune", steps=900)
flickr8k_small_align = partial(_small, "align", steps=1100)
