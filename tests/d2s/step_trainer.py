"""A trainer without data, engine or model: a step is a forward and a backward pass of any module."""

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from d2s.training.trainer import Trainer
from d2s.workers.group import Workers


class Engine:
    """The least that a step needs of one: it knows of nothing but its module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def eval(self) -> None:
        self.module.eval()

    def zero_optimization(self) -> bool:
        return False

    def zero_grad(self) -> None:
        self.module.zero_grad()

    def step(self) -> None:
        pass

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


class Step(Trainer):
    """A trainer whose step is a forward and a backward pass of its module."""

    _in_pieces = False

    def _whole(self, batch: SimpleNamespace) -> tuple:
        loss = self.engine.module(batch.rows)
        return (loss * batch.factor, loss, loss), lambda factor: self.engine.backward(loss * batch.slope)


def trainer(module: nn.Module, damage_budget: int = 9) -> Step:
    return Step(
        config=SimpleNamespace(
            nonfinite_limit=9, log=SimpleNamespace(save_minutes=0),
            data=SimpleNamespace(damage_budget=damage_budget),
        ),
        run=Path(), workers=Workers(rank=0, world=1, local_rank=0, device=torch.device("cpu")),
        index=None, engine=Engine(module), whole=None, batches=SimpleNamespace(damaged=[]), total_steps=9,
        teacher=None, log=None, preemption=SimpleNamespace(received=0),
        origin=SimpleNamespace(watch=lambda: None, rest=lambda: None),
    )  # fmt: skip
