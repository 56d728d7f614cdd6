"""A small engine whose checkpoints are killed and damaged by kill_points.py and damage_points.py."""

import shutil
from pathlib import Path

import torch
from torch import nn

from d2s.checkpoint import store as checkpoint
from d2s.checkpoint.zero_state import ZeroState
from d2s.training.engine import EngineConfig, engine_settings, start_engine
from d2s.training.optimizer import OptimConfig, build_optimizer
from d2s.workers.group import start_workers

STATE = {"to_validate": False, "best": {}, "damaged": 0, "truncated": 0, "skipped": 0}


class Saves:
    """An engine with its states after steps 1 and 2, and a run with checkpoints of the first `keep` of them."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.run, self.copy = folder / "run", folder / "copy"
        self.keep, self.workers = keep, start_workers()
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)).to(self.workers.device)
        self.engine = start_engine(
            module, build_optimizer(module, [], OptimConfig()), engine_settings(EngineConfig(), 4, 0.0)
        )
        self.states: dict[int, dict] = {}
        for step in (1, 2):
            self.engine.backward(self.engine(torch.randn(4, 3, device=self.workers.device)).square().mean())
            self.engine.step()
            self.states[step] = self.snapshot()
            if step <= self.keep:
                self.save(step)
        self.run.rename(self.copy)

    def snapshot(self) -> dict[str, torch.Tensor]:
        slices = ZeroState(self.engine).slices()
        return {one.name: one.values.clone() for one in slices}

    def save(self, step: int) -> None:
        checkpoint.save(self.run, step, {**STATE, "step": step}, self.engine, self.workers, keep=self.keep)

    def restored(self) -> int:
        """The step from which a restart continues; every bit of its state is checked."""
        for one in ZeroState(self.engine).slices():
            one.values.fill_(7)
        state = checkpoint.load(self.run, self.engine, self.workers)
        assert state is not None, "no checkpoint was found"
        found = self.snapshot()
        for name, values in self.states[state["step"]].items():
            assert torch.equal(found[name], values), f"{name} is not that of step {state['step']}"
        return state["step"]

    def put_back(self) -> None:
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.copytree(self.copy, self.run)

    def fill(self, step: int) -> None:
        for one in ZeroState(self.engine).slices():
            one.values.copy_(self.states[step][one.name])
