"""A trainer without data, DeepSpeed or real model: a step is a forward and a backward pass of any module."""

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from d2s.data.damage import Damage
from d2s.training.state import RunState
from d2s.training.trainer import Trainer
from d2s.workers.group import Workers


class Engine:
    """What a training step asks of an engine."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def zero_optimization(self) -> bool:
        return False

    def zero_grad(self) -> None:
        self.module.zero_grad()

    def step(self) -> None:
        pass


class Computation:
    """The loss is the module's output; a batch's factor spoils the loss, its slope the gradient."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def forward(self, batch: SimpleNamespace, step: int, warmup: float) -> tuple[torch.Tensor, ...]:
        loss = self.module(batch.rows)
        self.spoilt = loss * batch.slope
        return loss * batch.factor, loss, loss

    def backward(self, total: torch.Tensor) -> None:
        self.spoilt.backward()


def trainer(module: nn.Module, damage_budget: int = 9) -> Trainer:
    damaged: list[str] = []
    return Trainer(
        config=SimpleNamespace(
            nonfinite_limit=9,
            checkpoint=SimpleNamespace(every_minutes=0),
            data=SimpleNamespace(damage_budget=damage_budget),
            loss=SimpleNamespace(warmup_epochs=0),
            to_dict=dict,
        ),
        run=Path(), workers=Workers(rank=0, world=1, device=torch.device("cpu")),
        index=None, engine=Engine(module), full_model=None,
        batches=SimpleNamespace(damaged=damaged, steps_per_epoch=9), computation=Computation(module), total_steps=9,
        state=RunState(damage=Damage(damaged)), preemption=SimpleNamespace(received=0),
        detector=SimpleNamespace(start=lambda: None, stop=lambda: None),
    )  # fmt: skip
