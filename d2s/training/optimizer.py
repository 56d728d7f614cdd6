"""Builds AdamW with its parameter groups, and computes the learning rate of a training step."""

from itertools import pairwise
from math import cos, pi
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt
from torch import nn

from d2s.common.settings import Settings, settings

Beta = Annotated[float, Field(ge=0, lt=1)]


@settings("optim")
class OptimConfig(Settings):
    """Optimizer and learning-rate schedule. The default rates are the paper's, for a global batch of 128."""

    lr: NonNegativeFloat = 2e-4
    """Learning rate of all parameters outside the backbones: heads, pooling, decoder, temperature."""
    backbone_lr: NonNegativeFloat = 2e-5
    """Learning rate of the two backbones."""
    weight_decay: NonNegativeFloat = 1e-4
    """Decoupled weight decay. It is 0 for biases, norms and other one-dimensional parameters."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW's decay rates of the first and the second moment."""
    grad_clip: NonNegativeFloat = 2.0
    """Clip the norm of the gradient over all parameters to this value; 0 switches clipping off."""
    schedule: Literal["steps", "cosine", "constant"] = "steps"
    """steps: multiply the rate by optim.decay at each milestone. cosine: lower the rate to 0 along half a cosine."""
    milestones: tuple[NonNegativeFloat, ...] = (9, 15, 20, 25)
    """Epochs at which the schedule "steps" lowers the learning rate."""
    decay: Annotated[float, Field(gt=0, le=1)] = 0.3
    """The learning rate is multiplied by this number at each milestone."""
    warmup_steps: NonNegativeInt = 0
    """Number of training steps at the start in which the learning rate rises linearly from 0."""

    def __post_init__(self) -> None:
        if not all(before < after for before, after in pairwise(self.milestones)):
            raise ValueError(f"optim.milestones is {self.milestones}: each must be later than the one before")


def lr_factor(config: OptimConfig, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """Returns the factor, from 0 to 1, of all learning rates at training step `step`. The first step is 0."""
    factor = 1.0
    if config.schedule == "steps":
        epoch = step // steps_per_epoch
        factor = config.decay ** sum(epoch >= milestone for milestone in config.milestones)
    elif config.schedule == "cosine":
        factor = 0.5 * (1 + cos(pi * min(1.0, step / max(1, total_steps))))
    if step < config.warmup_steps:
        factor *= (step + 1) / config.warmup_steps
    return factor


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets the learning rate of every parameter group to `factor` times the group's `base_lr`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def build_optimizer(
    module: nn.Module, backbone: list[nn.Parameter], config: OptimConfig
) -> torch.optim.AdamW:
    """Returns AdamW for the trainable parameters of `module`. Groups them by learning rate and weight decay.
    backbone: the parameters that get config.backbone_lr. All others get config.lr. Raises ValueError if no parameter
    is trainable."""
    backbone_ids = {id(parameter) for parameter in backbone}
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for parameter in module.parameters():
        if parameter.requires_grad:
            part = "backbone" if id(parameter) in backbone_ids else "head"
            groups.setdefault((part, parameter.ndim > 1), []).append(parameter)
    if not groups:
        raise ValueError("no parameter is trainable: unfreeze a tower or give the model a head")
    rates = {"backbone": config.backbone_lr, "head": config.lr}
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": rates[part],
                "base_lr": rates[part],
                "weight_decay": config.weight_decay if decayed else 0.0,
                "name": f"{part}{'' if decayed else '_no_decay'}",
            }
            for (part, decayed), parameters in sorted(groups.items())
        ],
        betas=config.betas,
    )
