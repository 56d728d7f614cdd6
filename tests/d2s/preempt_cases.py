"""Two workers in one process group that go through many interrupted trainings; the test starts `main` in both.

Signals are real ones, which a worker sends to itself at
an exact point; so are the numbers that are not finite.
"""

import contextlib
import hashlib
import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from model_towers import small_vit

import d2s.train
import d2s.training.build
from d2s.checkpoint import store as checkpoint
from d2s.training.gradient_cache import MicroBatches
from d2s.training.recipes import RECIPES
from d2s.training.trainer import Trainer
from d2s.workers.group import leave, start_workers
from d2s.workers.preemption import Preemption

SMALL = (
    "--batch_size 8 --max_steps 8 --log.every 1 --validation.every_epochs 1 --data.loader_workers 0 --model.width 16 "
    "--data.image_size 32 --model.image_size 32 --optim.warmup_steps 0"
).split()
PRETRAIN = "scenes_small_pretrain"
RANK = int(os.environ["RANK"])
Hit = Callable[[], object]


def _without_batch_norm() -> Any:
    """A recipe that can be cut into micro-batches."""
    config = RECIPES["scenes_small_pretrain"]()
    model = replace(config.model, image_encoder=small_vit(16, 1), text_mlp_norm="layer")
    return replace(config, model=model)


RECIPES["cut"] = _without_batch_norm


@contextlib.contextmanager
def before(
    owner: Any, name: str, hit: Hit, when: Callable[[Any], bool] = lambda owner: True
) -> Iterator[None]:
    """Calls `hit` once, before the first call of owner.name for whose first argument `when` holds."""
    real, done = getattr(owner, name), []

    def wrapped(*arguments: Any, **named: Any) -> Any:
        if not done and when(arguments[0]):
            done.append(True)
            hit()
        return real(*arguments, **named)

    setattr(owner, name, wrapped)
    try:
        yield
    finally:
        setattr(owner, name, real)


def at(step: int) -> Any:
    """Before the training step of that number, counted from 0."""
    return partial(before, Trainer, "train_step", when=lambda trainer: trainer.state.step == step)


def kill(*numbers: signal.Signals, rank: int | None = None) -> Hit:
    """Sends this process signals, if it is the one that is meant."""
    return lambda: [os.kill(os.getpid(), number) for number in numbers if rank in (None, RANK)]


class Group:
    """What was asked for, and what came of it on both workers."""

    def __init__(self, data: str, folder: Path) -> None:
        self.data, self.folder, self.results = data, folder, {}

    def go(self, name: str, run: str, *arguments: str, hit: Any = None, recipe: str = PRETRAIN) -> None:
        """One training; its exit codes, writes of checkpoints and errors stand in the results under `name`."""
        errors, saves, preemption = io.StringIO(), [], Preemption()
        counted = before(checkpoint, "save", lambda: None, when=lambda run: bool(saves.append(1)))
        command = [recipe, "--data", self.data, "--run", str(self.folder / run), *SMALL, *arguments]
        preemption.install()
        with contextlib.redirect_stderr(errors), counted, hit or contextlib.nullcontext():
            code = d2s.train.main(command, preemption)
        preemption.uninstall()
        found: list[Any] = [None, None]
        told = [line for line in errors.getvalue().splitlines() if line.startswith("train.py: ")]
        dist.all_gather_object(found, (code, len(saves), told))
        self.results[name] = {
            "codes": [f[0] for f in found],
            "saves": found[0][1],
            "errors": [f[2] for f in found],
        }

    def twice(self, run: str, *arguments: str, hit: Any, recipe: str = PRETRAIN) -> None:
        """A training that is interrupted, and the same again with --resume."""
        self.go(run, run, *arguments, hit=hit, recipe=recipe)
        if RANK == 0:
            newest = checkpoint.newest(self.folder / run)
            state = json.loads((newest / "complete.json").read_text()) if newest else {}
            self.results[run] |= {"step": state.get("step"), "to_validate": state.get("to_validate")}
        self.go(f"{run}, resumed", run, *arguments, "--resume", recipe=recipe)


def interruptions(group: Group) -> None:
    """Every point at which a signal may come."""
    usr2 = signal.SIGUSR2
    group.go("in peace", "in peace")
    group.twice("all", hit=at(2)(kill(usr2)))
    group.twice("one worker", hit=at(4)(kill(signal.SIGTERM, rank=1)))
    group.twice("last step of an epoch", hit=at(5)(kill(signal.SIGUSR1, rank=0)))
    group.twice("evaluation", hit=before(Trainer, "evaluate", kill(usr2, rank=1)))
    group.twice("saving", hit=before(checkpoint, "save", kill(usr2, usr2, signal.SIGTERM)))
    windows = ("--log.every", "3", "--checkpoint.every_steps", "2")
    group.go("windows in peace", "windows in peace", *windows)
    group.twice("windows", *windows, hit=at(3)(kill(usr2)))
    cut = ("--engine.micro_batch", "2")
    group.go("cut in peace", "cut in peace", *cut, recipe="cut")
    third = before(MicroBatches, "backward", kill(usr2, rank=1), when=_third())
    group.twice("accumulation", *cut, hit=third, recipe="cut")


def _third() -> Callable[[Any], bool]:
    calls: list[int] = []
    return lambda cache: bool(calls.append(1) or len(calls) == 3)


def preparation(group: Group) -> None:
    """Signals before the first step, and restarts that get no further."""
    for number in range(3):
        group.go(f"start {number}", "stalled", "--resume", hit=_at_once())
    group.go("start 3", "stalled", "--resume")
    group.go("start 4", "stalled", "--resume", "--checkpoint.max_stalled_restarts", "0")
    for _ in range(5):
        group.go("done again", "stalled", "--resume")
    teacher = ("--init", str(group.folder / "in peace"), "--max_steps", "2")
    table = before(d2s.training.build, "teacher_table", kill(signal.SIGUSR2, rank=1))
    group.go("teacher", "teacher", *teacher, hit=table, recipe="scenes_small_finetune")
    if RANK == 0:
        group.results["teacher"]["table"] = (group.folder / "teacher" / "teacher" / "teacher.json").exists()
    group.go("teacher, resumed", "teacher", *teacher, "--resume", recipe="scenes_small_finetune")


@contextlib.contextmanager
def _at_once() -> Iterator[None]:
    kill(signal.SIGUSR2, rank=1)()
    yield


def not_finite(group: Group) -> None:
    """Losses and gradients of the second worker that are not finite, at steps 2 and 3 of 8."""
    for stage in "0123":
        for kind in ("loss", "gradient"):
            moved: list[bool] = []
            name = f"{kind}, ZeRO {stage}"
            with _poison(kind, {2, 3}, moved):
                group.go(name, name, "--engine.zero_stage", stage, "--engine.precision", "fp32")
            found: list[Any] = [None, None]
            dist.all_gather_object(found, moved)
            group.results[name]["moved"] = found
    # Without BatchNorm, which computes over all workers and spreads what one of them has.
    for kind, size in (
        ("loss", "0"),
        ("loss in pieces", "2"),
        ("gradient", "0"),
        ("gradient in pieces", "2"),
    ):
        with _poison(kind.split()[0], {2, 3, 4}, []):
            name, cut = f"{kind}, limit", ("--nonfinite_limit", "2", "--engine.micro_batch", size)
            group.go(name, name, *cut, recipe="cut")


@contextlib.contextmanager
def _poison(kind: str, steps: set[int], moved: list[bool]) -> Iterator[None]:
    """Spoils those steps on worker 1, and notes for each whether a weight or a moment has moved."""
    real = Trainer.train_step

    def step(self: Trainer, batch: Any) -> Any:
        if self.state.step not in steps:
            return real(self, batch)
        old = _digest(self)
        forward = self.model.forward_image

        def spoilt(*arguments: Any) -> torch.Tensor:
            rows = forward(*arguments)
            if kind == "loss":
                return rows * torch.nan
            if rows.requires_grad:
                rows.register_hook(lambda grad: grad * torch.inf)
            return rows

        if RANK == 1:
            self.model.forward_image = spoilt
        try:
            return real(self, batch)
        finally:
            self.model.__dict__.pop("forward_image", None)
            moved.append(_digest(self) != old)

    Trainer.train_step = step
    try:
        yield
    finally:
        Trainer.train_step = real


def _digest(trainer: Trainer) -> str:
    """Of everything that a step may move, but buffers, which a forward pass moves."""
    digest = hashlib.sha256()
    held = [p for group in trainer.engine.optimizer.param_groups for p in group["params"]]
    if trainer.config.engine.zero_stage < 3:  # which shows whole weights or none, as the moment wants
        held += trainer.model.parameters()
    for parameter in held:
        digest.update(parameter.detach().cpu().numpy().tobytes())
    for state in trainer.engine.optimizer.state.values():
        for value in state.values():
            digest.update(torch.as_tensor(value).detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def _meet() -> Any:
    """What processes that have just been started do: none builds before all have checked the run folder."""
    dist.barrier()
    return start_workers()


def main(data: str, folder: Path) -> None:
    """Writes FOLDER/results.json."""
    d2s.train.SECONDS_AFTER_WORKER_0 = 0.0
    start_workers()
    d2s.training.build.start_workers = _meet
    cases = Group(data, folder)
    for part in (interruptions, preparation, not_finite):
        part(cases)
    if RANK == 0:
        (cases.folder / "results.json").write_text(json.dumps(cases.results))
    leave(0, ordered=True)
