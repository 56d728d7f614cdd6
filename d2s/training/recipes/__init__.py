"""Recipes. A recipe is a named function that returns a configuration. Each data set has a file with its recipes.

A name gives data set, image tower, input size in pixels and stage: `f30k_vitb16_384_pretrain`. The paper's models are
called 224 and 384, but were trained at 384 and 480 pixels. The names here give the true size. `pretrain` is stage 1,
`finetune` is stage 2, and `align` is the baseline without decoder and teacher. If the authors' released code differs
from the paper, a `_compat` recipe follows the code, so that it can reproduce the code's numbers.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

from d2s.common.settings import did_you_mean
from d2s.training.config import TrainConfig
from d2s.training.recipes import coco, flickr8k, flickr30k, scenes

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    name: recipe
    for data_set in (flickr30k, coco, flickr8k, scenes)
    for name, recipe in vars(data_set).items()
    if isinstance(recipe, partial)
}
"""Maps the names of recipes to the recipes. Each `partial` in a data set's file is a recipe."""


def find_recipe(name: str) -> TrainConfig:
    """Returns the configuration of the recipe `name`. If there is no such recipe, raises ValueError with the most
    similar name."""
    if name not in RECIPES:
        raise ValueError(f"there is no recipe {name!r}{did_you_mean(name, RECIPES) or '; --help lists them'}")
    return dataclasses.replace(RECIPES[name](), recipe=name)
