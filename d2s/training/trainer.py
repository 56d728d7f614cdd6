"""The training loop.

A step in order: batch, learning rate, forward, one exchange of what all must know (is the loss finite, is anyone
asked to stop, is a checkpoint due, the losses), backward, clip and step, log; at the end of an epoch: checkpoint,
validate, keep the best. Nothing else decides what happens, so a run is a pure function of its configuration and its
data.
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from d2s.checkpoint import store as checkpoint
from d2s.checkpoint.export import write_model
from d2s.checkpoint.full_model import FullModel
from d2s.data.batches import Batch, TrainBatches
from d2s.data.damage import Damage, check_budget
from d2s.data.stream import StreamBatches
from d2s.evaluate.evaluation import Evaluation, evaluate_model
from d2s.model import D2SModel, Teacher
from d2s.model.running_statistics import RunningStatistics
from d2s.shards.read.index import ShardIndex
from d2s.training.config import TrainConfig, to_dict
from d2s.training.gradient_cache import GradientCache
from d2s.training.nonfinite import Origin, report
from d2s.training.optimizer import lr_factor, set_learning_rate
from d2s.training.run_log import RunLog
from d2s.training.teacher_table import TeacherTable
from d2s.workers.collectives import barrier, run_on_all, sum_over_workers
from d2s.workers.group import Workers
from d2s.workers.preemption import Preempted, Preemption


@dataclass(kw_only=True)
class Trainer:
    """One run: everything that the loop touches, and how far it has come."""

    config: TrainConfig
    run: Path
    workers: Workers
    index: ShardIndex
    engine: Any
    whole: FullModel
    batches: TrainBatches | StreamBatches
    total_steps: int
    teacher: Teacher | TeacherTable | None
    log: RunLog
    preemption: Preemption
    origin: Origin
    lock: int | None = None
    """Held open as long as this process trains into the run folder."""
    step: int = 0
    to_validate: bool = False
    best: dict[str, float] = field(default_factory=dict)
    truncated: int = 0
    truncated_before: int = 0
    """Captions that all workers cut before the run was resumed."""
    grad_norm: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    window: list[Tensor] = field(default_factory=list)
    """(total, align, distill) of every step since the last row of metrics, over all workers."""
    stopping: bool = False
    """All know that one of them was asked to stop; so they do as soon as the step is over."""
    due: bool = False
    """The first worker's clock asks for a checkpoint."""
    saved: tuple[int, bool] | None = None
    """Step and to_validate of the newest checkpoint."""
    saved_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.statistics = RunningStatistics(self.engine.module)
        self.damage = Damage(self.batches.damaged)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: Any) -> None:
        """Closes the log and lets go of the run folder."""
        self.log.__exit__(*failure)
        if self.lock is not None:
            os.close(self.lock)

    def train(self) -> None:
        """Runs to the last step, from wherever `step` stands.

        Raises Preempted, on all workers together and with a checkpoint of the present step, if one was asked to stop.
        """
        try:
            self._train()
        except Preempted:
            if self.saved != (self.step, self.to_validate):
                self.save()
            raise

    def _train(self) -> None:
        per_epoch = self.batches.steps_per_epoch
        while True:
            if self.to_validate:  # also where a resumed run was stopped between the two
                self._validate()
                self.to_validate = False
                self._update_checkpoint()
            if self.step >= self.total_steps:
                break
            self.preemption.check()
            epoch, start = divmod(self.step, per_epoch)
            self.engine.train()
            self._train_epoch(epoch, start)
            last = self.step == self.total_steps
            if last or (epoch + 1) % self.config.log.evaluate_epochs == 0:
                self.to_validate = True
            if self.to_validate or self._save_is_due():
                self.save()
        self._export("last")
        barrier()

    @property
    def model(self) -> D2SModel:
        return self.engine.module.model

    def _train_epoch(self, epoch: int, start: int) -> None:
        """Trains to the end of the epoch, or of the run, and leaves what is due there to the caller."""
        clock, steps = time.monotonic(), 0
        for batch in self.batches.epoch(epoch, start):
            factor = lr_factor(self.config.optim, self.step, self.batches.steps_per_epoch, self.total_steps)
            set_learning_rate(self.engine.optimizer, factor)
            self.window.append(self._train_step(batch))
            self.step += 1
            steps += 1
            last = self.step == self.total_steps
            if last or self.step % self.config.log.every == 0:
                self._log(factor, steps, time.monotonic() - clock)
                clock, steps = time.monotonic(), 0
            if last or self.step % self.batches.steps_per_epoch == 0:
                break
            if self._save_is_due():
                self.save()
            if self.stopping:
                self.preemption.check()

    def _save_is_due(self) -> bool:
        every = self.config.log.save_steps
        return self.due or bool(every and self.step % every == 0)

    def _train_step(self, batch: Batch) -> Tensor:
        """One optimization step; returns (total, align, distill) over all workers, shape (3,)."""
        for line in self.damage.new_lines():  # each worker speaks of its own
            self.log.say(f"damaged sample replaced: {line}")
        self.statistics.keep()
        losses, backward = self._pieces(batch) if self._in_pieces else self._whole(batch)
        finite, sums = self._exchange(torch.stack(list(losses)).detach())
        if finite:
            # The engine averages gradients over workers, and the loss is the sum of their shares.
            backward(self.workers.world)
            self._update(batch)
        else:
            self._skip(batch, "loss", mine=not torch.isfinite(losses[0]).item())
        self.truncated += batch.truncated  # now that no signal can end the step, which would count them again
        return sums

    @property
    def _in_pieces(self) -> bool:
        return 0 < self.config.engine.micro_batch < self.config.batch_size // self.workers.world

    def _whole(self, batch: Batch) -> tuple[tuple[Tensor, ...], Callable[[float], object]]:
        """This worker's share of (total, align, distill), and what sends a multiple of it backward."""
        _seed_step(self.config.seed, self.step, self.workers.rank)
        batch = batch.to(self.workers.device)
        losses = self.engine(batch, self._warmup(), self._teacher_rows(batch))
        return losses, lambda factor: self.engine.backward(losses[0] * factor)

    def _pieces(self, batch: Batch) -> tuple[tuple[Tensor, ...], Callable[[float], object]]:
        """The same by micro-batches; Preempted may be raised between any two."""
        cache = GradientCache(
            self.engine, batch, self.config.engine.micro_batch, self.workers.device,
            seed=lambda number: _seed_step(self.config.seed, self.step, self.workers.rank, number),
            poll=self.preemption.check,
        )  # fmt: skip
        losses = cache.losses(self.engine.module.objective, self._warmup(), self._teacher_rows)
        self.origin.look(*cache.embeddings)
        return losses, cache.backward

    def _exchange(self, losses: Tensor) -> tuple[bool, Tensor]:
        """Tells all workers what they must know to act alike, in one exchange; see `stopping` and `due`.

        losses: this worker's shares of (total, align, distill), shape (3,), without gradient.
        Returns whether every worker's total is finite, and the sums of the shares, shape (3,), on the CPU.
        """
        minutes = self.config.log.save_minutes
        due = self.workers.is_main and minutes and time.monotonic() - self.saved_at >= 60 * minutes
        flags = losses.new_tensor([bool(self.preemption.received), bool(due)])
        bad = ~torch.isfinite(losses[:1])
        told = sum_over_workers(torch.cat([bad.to(losses.dtype), flags, losses])).cpu()
        bad, asked, due = (bool(flag) for flag in told[:3].tolist())
        self.stopping, self.due = self.stopping or asked, self.due or due
        return not bad, told[3:]

    def _update(self, batch: Batch) -> None:
        """Clips and applies the gradient, or skips the step, on all workers, where its norm is not finite."""
        if self.engine.zero_optimization():
            # ZeRO looks at the norm over all workers before it touches a weight or a moment.
            self.engine.step()
            applied = self.engine.was_step_applied()
            self.grad_norm = float(self.engine.get_global_grad_norm() or 0.0)
        else:
            # Every worker holds the whole gradient, the same to the bit.
            gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
            self.grad_norm = torch.nn.utils.get_total_norm(gradients).item()
            applied = math.isfinite(self.grad_norm)
            if applied:
                self.engine.step()
            else:
                self.engine.zero_grad()
        if applied:
            self.statistics.settle()
            self.skipped_in_a_row = 0
            self.origin.rest()
        else:
            self._skip(batch, "gradient")

    def _warmup(self) -> float:
        steps = self.config.loss.warmup_epochs * self.batches.steps_per_epoch
        return (self.step + 1) / steps if self.step < steps else 1.0

    def _teacher_rows(self, batch: Batch) -> Tensor | None:
        if self.teacher is None:
            return None
        if isinstance(self.teacher, TeacherTable):
            return self.teacher.rows(batch.dense_index).to(self.workers.device)
        with torch.no_grad():
            return self.teacher(batch.dense_ids, batch.dense_mask)

    def _skip(self, batch: Batch, what: str, *, mine: bool = False) -> None:
        """Counts a step that all skip. Raises FloatingPointError, on all of them, where it is one too many.

        what: "loss" or "gradient"; mine: this worker's share of it is not finite.
        """
        self.statistics.put_back()
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row < self.config.nonfinite_limit:
            self.origin.watch()
            return
        rows = [row for row in batch.samples.tolist() if row >= 0]  # a stream's samples have none
        evidence = 2 if self.origin.here() else int(mine)
        raise FloatingPointError(report(what, self.skipped_in_a_row, evidence, self.index.keys(rows)))

    def _count_over_workers(self) -> tuple[int, int]:
        """Damaged samples and cut captions of all workers, those of the run before a resume included.

        Raises ValueError, on every worker, where more samples are damaged than the run may replace.
        """
        counts = torch.tensor([self.damage.unshared, self.truncated], dtype=torch.int64)
        unshared, truncated = sum_over_workers(counts.to(self.workers.device)).tolist()
        if unshared:
            self.damage.share()
        check_budget(self.damage.known, self.config.data.damage_budget)
        return len(self.damage.known), truncated + self.truncated_before

    def _log(self, factor: float, steps: int, seconds: float) -> None:
        """Closes the window of steps with a row; `steps` of them were made in the last `seconds`."""
        total, align, distill = torch.stack(self.window).mean(0).tolist()
        self.window.clear()
        damaged, truncated = self._count_over_workers()
        if not self.workers.is_main:
            return
        config = self.config
        values: dict[str, Any] = {
            "epoch": self.step / self.batches.steps_per_epoch,
            "loss": total,
            "align": align / config.batch_size,
            "distill": distill / config.batch_size,
            "lr": config.optim.lr * factor,
            "grad_norm": float(self.grad_norm),
            "samples_per_s": steps * config.batch_size / seconds,
            "seconds": seconds,
            "skipped": self.skipped,
            "damaged": damaged,
            "truncated": truncated,
        }
        self.log.row("train", self.step, values)
        self.log.progress(self.step, values)

    def _validate(self) -> None:
        start = time.monotonic()
        self.engine.eval()
        with self.whole.full() as model:
            result = self._evaluate(model)
        score = run_on_all(lambda: self.score(result))[0]  # whether to export, all must decide alike
        improved = score > self.best.get("rsum", -1.0)
        if improved:
            self.best = {"rsum": score, "step": self.step}
        if improved:
            self._export("best")
        if not self.workers.is_main:
            return
        epoch = self.step / self.batches.steps_per_epoch
        seconds = time.monotonic() - start
        self.log.row("val", self.step, {"epoch": epoch, "seconds": seconds, **result.to_dict()})
        what = "dense" if self.config.stage == "pretrain" else "sparse"
        mark = "  (best)" if improved else f"  (best {self.best['rsum']:.1f})"
        self.log.say(f"step {self.step}  val rSum, {what} captions: {score:.1f}{mark}")

    def _export(self, name: str) -> None:
        """Writes the model folder `name` of the run. Raises ValueError, on all workers, where that fails."""

        def write() -> None:
            if self.workers.is_main:
                write_model(self.run / name, model)

        with self.whole.full() as model:
            try:
                run_on_all(write)
            except ValueError as error:
                raise ValueError(
                    f"model {self.run / name} could not be written ({error}): make room or mend it, then --resume"
                ) from None

    def _evaluate(self, model: D2SModel) -> Evaluation:
        return evaluate_model(
            model,
            self.index,
            "val",
            data_config=self.config.data,
            rank=self.workers.rank,
            world=self.workers.world,
            dense=self.config.stage == "pretrain",
            full=False,
            poll=self.preemption.check,
        )

    def score(self, result: Evaluation) -> float:
        """What the best model is chosen by: rSum of the captions that the stage aligns."""
        return result.dense.rsum if self.config.stage == "pretrain" else result.rsum

    def save(self) -> None:
        """Writes a checkpoint of the present step, on all workers together."""
        keep = self.config.log.keep
        checkpoint.save(self.run, self.step, self._state(), self.engine, self.workers, keep=keep)
        self.saved, self.saved_at, self.due = (self.step, self.to_validate), time.monotonic(), False

    def _update_checkpoint(self) -> None:
        """Adds what validation found to the checkpoint of this step."""
        checkpoint.update(self.run, self.step, self._state(), is_main=self.workers.is_main)
        self.saved = (self.step, self.to_validate)

    def _state(self) -> dict[str, Any]:
        damaged, truncated = self._count_over_workers()
        return {
            "step": self.step,
            "to_validate": self.to_validate,
            "best": self.best,
            "damaged": damaged,
            "damaged_samples": self.damage.known,
            "truncated": truncated,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "window": [losses.tolist() for losses in self.window],
            "config": to_dict(self.config),
        }

    def restore(self) -> None:
        """Continues from the newest intact checkpoint, if there is any. Raises ValueError where all are damaged."""
        state = checkpoint.load(self.run, self.engine, self.workers)
        if state is None:
            return
        self.step, self.best, self.to_validate = state["step"], state["best"], state["to_validate"]
        self.saved = (self.step, self.to_validate)
        self.skipped, self.skipped_in_a_row = state["skipped"], state.get("skipped_in_a_row", 0)
        self.window = [torch.tensor(losses) for losses in state.get("window", [])]
        self.truncated_before = state["truncated"]
        self.damage.restore(state.get("damaged_samples", []))

    def summary(self) -> str:
        """The line that closes a run."""
        return (
            f"done: {self.step} steps, best val rSum {self.best['rsum']:.1f} at step {self.best['step']}, "
            f"in {self.run}"
        )


def _seed_step(seed: int, step: int, rank: int, *micro_batch: int) -> None:
    """Dropout's draws follow from (seed, step, rank), so that a resumed run draws what it would have drawn."""
    words = np.random.SeedSequence([seed, step, rank, *micro_batch]).generate_state(1, np.uint64)
    torch.manual_seed(int(words[0] >> 1))
