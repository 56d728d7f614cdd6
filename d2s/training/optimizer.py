"""AdamW, its parameter groups, and the learning rate as a pure function of the step."""

from dataclasses import dataclass
from itertools import pairwise
from math import cos, inf, pi
from typing import Literal

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and schedule. Learning rates are those of the paper at a global batch of 128."""

    lr: float = 2e-4
    """Learning rate of everything that starts from random weights: heads, pooling, decoder, temperature."""
    backbone_lr: float = 2e-5
    """Learning rate of the two backbones."""
    weight_decay: float = 1e-4
    """Decoupled weight decay; biases, norms and other one-dimensional parameters take none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the two moments."""
    grad_clip: float = 2.0
    """Largest norm of the whole gradient; 0 switches clipping off."""
    schedule: Literal["steps", "cosine", "constant"] = "steps"
    """Learning rate over time: times `decay` at each milestone, a half cosine to zero, or constant."""
    milestones: tuple[float, ...] = (9, 15, 20, 25)
    """Epochs at which the stepped schedule drops."""
    decay: float = 0.3
    """Factor of each drop."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from zero."""

    def __post_init__(self) -> None:
        for name in ("lr", "backbone_lr", "weight_decay", "grad_clip", "warmup_steps"):
            if not 0 <= getattr(self, name) < inf:
                raise ValueError(f"optim.{name} is {getattr(self, name)}: it must be 0 or more, and finite")
        if not 0 < self.decay <= 1:
            raise ValueError(f"optim.decay is {self.decay}: it must be above 0 and at most 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas is {self.betas}: each must be from 0 up to, but not, 1")
        if not all(0 <= a < b for a, b in pairwise([*self.milestones, inf])):
            raise ValueError(f"optim.milestones is {self.milestones}: they must be 0 or more, and rise")


def lr_factor(config: OptimConfig, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """The factor on every learning rate at optimization step `step` (from 0), in [0, 1]."""
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
    """Writes every group's rate from its `base_lr`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def build_optimizer(
    module: nn.Module, backbone: list[nn.Parameter], config: OptimConfig
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `module`, in up to four groups: by rate and by decay.

    Raises ValueError where nothing is left to train.
    """
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
