"""Defines a training run: its objects and its progress. The methods log, save, validate and export."""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from d2s.checkpoint import store as checkpoint
from d2s.checkpoint.export import write_model
from d2s.checkpoint.full_model import FullModel
from d2s.data.batches import TrainBatches
from d2s.data.stream import StreamBatches
from d2s.evaluate.evaluation import Evaluation, evaluate_model
from d2s.model import D2SModel
from d2s.model.running_statistics import RunningStatistics
from d2s.shards.read.index import ShardIndex
from d2s.training.config import TrainConfig
from d2s.training.nonfinite import NonFiniteDetector
from d2s.training.run_log import RunLog
from d2s.training.state import RunState
from d2s.training.step import WholeBatch
from d2s.workers.collectives import run_on_all
from d2s.workers.group import Workers
from d2s.workers.preemption import Preemption


@dataclass(kw_only=True)
class Run:
    """A training run: its configuration, the objects that it uses, and its progress."""

    config: TrainConfig
    run: Path
    workers: Workers
    index: ShardIndex
    engine: Any
    full_model: FullModel
    batches: TrainBatches | StreamBatches
    computation: WholeBatch
    total_steps: int
    state: RunState
    preemption: Preemption
    detector: NonFiniteDetector
    log: RunLog | None = None
    lock: int | None = None
    """File descriptor that locks the run folder until it is closed. Only the first worker has it, others None."""
    saved_step: int | None = None
    """Training step of the newest checkpoint; None if there is none."""
    saved_at: float = field(default_factory=time.monotonic)
    timed_from: tuple[int, float] = (0, 0.0)
    """Training step and time from which throughput is measured: the last row of metrics or the start of the epoch."""
    grad_norm: float = 0.0
    """Norm of the newest gradient of the global loss, before clipping."""

    def __post_init__(self) -> None:
        self.statistics = RunningStatistics(self.engine.module)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: Any) -> None:
        """Closes the log and unlocks the run folder."""
        self.log.__exit__(*failure)
        if self.lock is not None:
            os.close(self.lock)

    @property
    def model(self) -> D2SModel:
        """The model inside the engine. Under ZeRO 3 its parameters are empty except during a training step."""
        return self.engine.module.model

    def log_row(self, factor: float) -> None:
        """Writes a row of metrics, with the mean losses since the last row. factor: result of `lr_factor`."""
        state, config = self.state, self.config
        steps, seconds = state.step - self.timed_from[0], time.monotonic() - self.timed_from[1]
        total, align, distill = torch.stack(state.recent_losses).mean(0).tolist()
        state.recent_losses.clear()
        damaged, truncated = state.count_over_workers(self.workers, config.data.damage_budget)
        self.timed_from = (state.step, time.monotonic())
        if not self.workers.is_main:
            return
        values: dict[str, Any] = {
            "epoch": state.step / self.batches.steps_per_epoch,
            "loss": total,
            "align": align / config.batch_size,
            "distill": distill / config.batch_size,
            "lr": config.optim.lr * factor,
            "grad_norm": float(self.grad_norm),
            "samples_per_s": steps * config.batch_size / seconds,
            "seconds": seconds,
            "skipped": state.skipped,
            "damaged": damaged,
            "truncated": truncated,
        }
        self.log.row("train", state.step, values)
        self.log.progress(state.step, values)

    def save(self) -> None:
        """Writes a checkpoint of the current training step. All workers call this together."""
        keep = self.config.checkpoint.keep
        checkpoint.save(self.run, self.state.step, self._saved_state(), self.engine, self.workers, keep=keep)
        self.saved_step, self.saved_at = self.state.step, time.monotonic()

    def restore(self) -> None:
        """Restores the newest intact checkpoint, if there are checkpoints. Raises ValueError if all are damaged."""
        saved = checkpoint.load(self.run, self.engine, self.workers)
        if saved is not None:
            self.state.restore(saved)
            self.saved_step = self.state.step

    def _saved_state(self) -> dict[str, Any]:
        state = self.state.to_dict(self.workers, self.config.data.damage_budget)
        return {**state, "config": self.config.to_dict()}

    def validate(self) -> None:
        """Evaluates the model on the val split. Exports the model if it is the best so far.
        Stores the result in the checkpoint of this training step. All workers call this together."""
        state, start = self.state, time.monotonic()
        self.engine.eval()
        with self.full_model.gathered() as model:
            result = self.evaluate(model)
        captions = "dense" if self.config.stage == "pretrain" else "sparse"  # aligned in this stage
        aligned = result.dense if captions == "dense" else result
        score = run_on_all(lambda: aligned.rsum)[0]  # the first worker's score, so that all decide the same
        improved = score > state.best.get("rsum", -1.0)
        if improved:
            state.best = {"rsum": score, "step": state.step}
            self.export("best")
        if self.workers.is_main:
            epoch = state.step / self.batches.steps_per_epoch
            seconds = time.monotonic() - start
            self.log.row("val", state.step, {"epoch": epoch, "seconds": seconds, **result.to_dict()})
            mark = "  (best)" if improved else f"  (best {state.best['rsum']:.1f})"
            self.log.say(f"step {state.step}  val rSum, {captions} captions: {score:.1f}{mark}")
        state.validation_pending = False
        checkpoint.update(self.run, state.step, self._saved_state(), is_main=self.workers.is_main)

    def evaluate(self, model: D2SModel) -> Evaluation:
        """Returns the metrics of the val split. Raises Preempted, on all workers, after a stop signal."""
        return evaluate_model(
            model,
            self.index,
            "val",
            data_config=self.config.data,
            dense=self.config.stage == "pretrain",
            full=False,
            poll=self.preemption.check,
        )

    def export(self, name: str) -> None:
        """Writes the model to the folder `name` in the run folder. All workers call this together.
        Raises ValueError, on all workers, if writing fails."""

        def write() -> None:
            if self.workers.is_main:
                write_model(self.run / name, model)

        with self.full_model.gathered() as model:
            try:
                run_on_all(write)
            except ValueError as error:
                raise ValueError(
                    f"model {self.run / name} could not be written ({error}): make room or mend it, then --resume"
                ) from None

    def summary(self) -> str:
        """Returns the last line that a finished run prints."""
        best = self.state.best
        return (
            f"done: {self.state.step} steps, best val rSum {best['rsum']:.1f} at step {best['step']}, "
            f"in {self.run}"
        )
