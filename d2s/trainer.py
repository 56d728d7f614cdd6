"""The training loop, and the module that the engine wraps.

A step in order: batch, learning rate, forward, agree that the loss is finite, backward, clip and step, log; at
the end of an epoch: validate, keep the best, checkpoint. Nothing else decides what happens, so a run is a pure
function of its configuration and its data.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from d2s import checkpoint
from d2s.config import TrainConfig, to_dict
from d2s.data import Batch, TrainBatches
from d2s.distributed import Workers, agree, barrier, sum_over_workers
from d2s.evaluate import Evaluation, evaluate_model
from d2s.logs import RunLog
from d2s.model import D2SModel, Teacher
from d2s.objective import Objective
from d2s.optim import lr_factor, set_learning_rate
from d2s.shards.index import ShardIndex
from d2s.stream_data import StreamBatches
from d2s.teacher import TeacherTable


class TrainingModule(nn.Module):
    """Model and objective in one module: a batch in, this worker's share of the losses out."""

    def __init__(self, model: D2SModel, objective: Objective, *, bf16: bool) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self._bf16 = bf16

    def forward(self, batch: Batch, warmup: float, teacher: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns total (with gradient), align and distill (0-dim); see :class:`d2s.objective.Objective`."""
        with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=self._bf16):
            image = self.model.forward_image(batch.images, batch.draw_seeds)
            text = self.model.forward_text(batch.text_ids, batch.text_mask).embedding
        text = nn.functional.normalize(text.float(), dim=-1)
        losses = self.objective(image, text, batch.image_ids, warmup=warmup, teacher=teacher)
        return losses.total, losses.align, losses.distill


@dataclass(kw_only=True)
class Trainer:
    """One run: everything that the loop touches, and how far it has come."""

    config: TrainConfig
    run: Path
    workers: Workers
    index: ShardIndex
    engine: Any
    batches: TrainBatches | StreamBatches
    total_steps: int
    teacher: Teacher | TeacherTable | None
    log: RunLog
    lock: int | None = None
    """Held open as long as this process trains into the run folder."""
    step: int = 0
    to_validate: bool = False
    best: dict[str, float] = field(default_factory=dict)
    damage_told: int = 0
    truncated: int = 0
    before: dict[str, int] = field(default_factory=lambda: {"damaged": 0, "truncated": 0})
    """Counts of the run before it was resumed."""
    grad_norm: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0

    def train(self) -> None:
        """Runs to the last step, from wherever `step` stands."""
        per_epoch = self.batches.steps_per_epoch
        while True:
            if self.to_validate:  # also where a resumed run was stopped between the two
                self._validate()
                self.to_validate = False
                self._update_checkpoint()
            if self.step >= self.total_steps:
                break
            epoch, start = divmod(self.step, per_epoch)
            self.engine.train()
            self._train_epoch(epoch, start)
            last = self.step == self.total_steps
            if last or (epoch + 1) % self.config.log.evaluate_epochs == 0:
                self.to_validate = True
                self.save()
        self._export("last")
        barrier()

    @property
    def model(self) -> D2SModel:
        return self.engine.module.model

    def _train_epoch(self, epoch: int, start: int) -> None:
        clock, shares = time.monotonic(), []
        for batch in self.batches.epoch(epoch, start):
            factor = lr_factor(self.config.optim, self.step, self.batches.steps_per_epoch, self.total_steps)
            set_learning_rate(self.engine.optimizer, factor)
            shares.append(self._train_step(batch))
            self.step += 1
            last = self.step == self.total_steps
            if last or self.step % self.config.log.every == 0:
                self._log(torch.stack(shares), factor, time.monotonic() - clock)
                clock, shares = time.monotonic(), []
            if last:
                break

    def _train_step(self, batch: Batch) -> Tensor:
        """One optimization step; returns this worker's share of (total, align, distill), shape (3,)."""
        self._report_damage(batch)
        _seed_step(self.config.seed, self.step, self.workers.rank)
        batch = batch.to(self.workers.device)
        losses = self.engine(batch, self._warmup(), self._teacher_rows(batch))
        if agree(not torch.isfinite(losses[0]).item(), self.workers.device):
            self._skip(batch)
        else:
            self.skipped_in_a_row = 0
            # The engine averages gradients over workers, and the loss is the sum of their shares.
            self.engine.backward(losses[0] * self.workers.world)
            self.grad_norm = self._grad_norm()
            self.engine.step()
            self.grad_norm = self.engine.get_global_grad_norm() or self.grad_norm
        return torch.stack([loss.detach() for loss in losses])

    def _grad_norm(self) -> float:
        """Norm of the whole gradient before clipping, where the engine will not tell: without ZeRO, in fp32."""
        if self.config.engine.zero_stage or (self.step + 1) % self.config.log.every:
            return 0.0
        norms = [p.grad.norm() for p in self.engine.module.parameters() if p.grad is not None]
        return torch.stack(norms).norm().item()

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

    def _skip(self, batch: Batch) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.config.nonfinite_limit:
            rows = [row for row in batch.samples[:8].tolist() if row >= 0]  # a stream's samples have none
            keys = ", ".join(self.index.keys(rows))
            raise FloatingPointError(
                f"worker {self.workers.rank}: the loss was not finite in {self.skipped_in_a_row} steps in a row, "
                f"the last with samples {keys} ...; lower optim.lr or set engine.precision to fp32"
            )

    def _report_damage(self, batch: Batch) -> None:
        """Says what was replaced, each sample once; every worker speaks of its own."""
        new = self.batches.damaged[self.damage_told :]
        self.damage_told += len(new)
        for note in new:
            self.log.say(f"damaged sample replaced: {note}")
        self.truncated += batch.truncated

    def _count_over_workers(self) -> tuple[int, int]:
        """Damaged samples and cut captions of all workers, those of the run before a resume included.

        Raises ValueError, on every worker, where more samples are damaged than the run may replace.
        """
        counts = torch.tensor([self.damage_told, self.truncated], dtype=torch.int64)
        damaged, truncated = sum_over_workers(counts.to(self.workers.device)).tolist()
        damaged, truncated = damaged + self.before["damaged"], truncated + self.before["truncated"]
        if damaged > self.config.data.damage_budget:
            raise ValueError(
                f"{damaged} samples could not be read, more than data.damage_budget "
                f"{self.config.data.damage_budget}: run `python -m d2s.shard verify` on the data"
            )
        return damaged, truncated

    def _log(self, shares: Tensor, factor: float, seconds: float) -> None:
        total, align, distill = sum_over_workers(shares).mean(0).tolist()
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
            "samples_per_s": len(shares) * config.batch_size / seconds,
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
        result = self._evaluate()
        score = self.score(result)
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
        """Writes the model folder `name` of the run."""
        if self.workers.is_main:
            checkpoint.replace_folder(self.run / name, self.model.save_pretrained)

    def _evaluate(self) -> Evaluation:
        return evaluate_model(
            self.model,
            self.index,
            "val",
            data_config=self.config.data,
            rank=self.workers.rank,
            world=self.workers.world,
            dense=self.config.stage == "pretrain",
            full=False,
        )

    def score(self, result: Evaluation) -> float:
        """What the best model is chosen by: rSum of the captions that the stage aligns."""
        return result.dense.rsum if self.config.stage == "pretrain" else result.rsum

    def save(self) -> None:
        """Writes a checkpoint of the present step, on all workers together."""
        checkpoint.save(
            self.run,
            self.step,
            self._state(),
            self.engine.save_checkpoint,
            is_main=self.workers.is_main,
            barrier=barrier,
            keep=self.config.log.keep,
        )

    def _update_checkpoint(self) -> None:
        """Adds what validation found to the checkpoint of this step."""
        state = self._state()
        if self.workers.is_main:
            checkpoint.update(self.run, self.step, state)
        barrier()

    def _state(self) -> dict[str, Any]:
        damaged, truncated = self._count_over_workers()
        return {
            "step": self.step,
            "to_validate": self.to_validate,
            "best": self.best,
            "damaged": damaged,
            "truncated": truncated,
            "skipped": self.skipped,
            "config": to_dict(self.config),
        }

    def restore(self, folder: Path) -> None:
        """Continues from a complete checkpoint. Raises ValueError where it is damaged."""
        state = checkpoint.load(folder, self.engine.load_checkpoint)
        self.step, self.best, self.to_validate = state["step"], state["best"], state["to_validate"]
        self.skipped = state["skipped"]
        self.before = {name: state[name] for name in self.before}

    def summary(self) -> str:
        """The line that closes a run."""
        return (
            f"done: {self.step} steps, best val rSum {self.best['rsum']:.1f} at step {self.best['step']}, "
            f"in {self.run}"
        )


def _seed_step(seed: int, step: int, rank: int) -> None:
    """Dropout's draws follow from (seed, step, rank), so that a resumed run draws what it would have drawn."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1))
