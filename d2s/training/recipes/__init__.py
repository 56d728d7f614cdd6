"""Recipes: names for functions that return a whole configuration. A data set has a file, a recipe a line in it.

A name says data set, image tower, input size in pixels and stage: `f30k_vitb16_384_pretrain`. The paper's own files
are called 224 and 384, but were trained at 384 and 480 pixels; the names here give the true size. Stages: `pretrain`
and `finetune` are stages 1 and 2; `align` is the baseline without decoder and teacher. `_compat` recipes switch on
what the authors' release does differently, so that its numbers can be reproduced.
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
"""Every recipe by name: each `partial` in a data set's file is one."""


def find_recipe(name: str) -> TrainConfig:
    """The recipe's configuration. Raises ValueError with the nearest name for an unknown one."""
    if name not in RECIPES:
        raise ValueError(f"there is no recipe {name!r}{did_you_mean(name, RECIPES) or '; --help lists them'}")
    return dataclasses.replace(RECIPES[name](), recipe=name)
