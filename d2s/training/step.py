"""Computes the losses and gradients of a training step, and updates the weights.

:class:`WholeBatch` embeds all pairs of a worker at once. :class:`d2s.training.gradient_cache.MicroBatches` embeds a
few pairs at a time. Both compute the same gradient: the gradient of the loss of the global batch.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2s.data.batch import Batch
from d2s.model import Teacher
from d2s.training.teacher_table import TeacherTable
from d2s.workers.group import Workers


class WholeBatch:
    """Runs the forward and the backward pass for this worker's part of a global batch, all pairs at once.

    engine: a DeepSpeed engine around a TrainingModule. teacher: None without distillation. seed: seed of the run.
    """

    def __init__(
        self, engine: Any, teacher: Teacher | TeacherTable | None, workers: Workers, seed: int
    ) -> None:
        self.engine, self.teacher, self.workers, self.seed = engine, teacher, workers, seed

    def forward(self, batch: Batch, step: int, warmup: float) -> tuple[Tensor, Tensor, Tensor]:
        """Returns this worker's part of total, align and distill, each of shape (). Only `total` has a gradient.

        step: the training step, which seeds the dropout. warmup: see :meth:`Objective.losses`.
        """
        seed_dropout(self.seed, step, self.workers.rank)
        batch = batch.to(self.workers.device)
        return self.engine(batch, warmup, self.teacher_embeddings(batch))

    def backward(self, total: Tensor) -> None:
        """Computes the gradient of the global loss, which the engine keeps. total: the first result of `forward`."""
        # The engine averages gradients over workers, but the loss is the sum of their parts.
        self.engine.backward(total * self.workers.world)

    def teacher_embeddings(self, batch: Batch) -> Tensor | None:
        """Returns the teacher's embeddings of the dense captions, of shape (B, D); None without distillation."""
        if self.teacher is None:
            return None
        if isinstance(self.teacher, TeacherTable):
            return self.teacher.rows(batch.dense_index).to(self.workers.device)
        with torch.no_grad():
            return self.teacher(batch.dense_ids, batch.dense_mask)


def clip_and_step(engine: Any) -> tuple[float, bool]:
    """Clips the gradient and updates the weights. Returns the norm before clipping, and whether weights were updated.

    If the norm is not finite, no worker updates its weights or its optimizer state.
    """
    if engine.zero_optimization():
        # ZeRO checks that the norm over all workers is finite before it changes weights or moments.
        engine.step()
        return float(engine.get_global_grad_norm() or 0.0), engine.was_step_applied()
    # Without ZeRO every worker has the whole gradient, with the same bits on all workers.
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients).item()
    if not math.isfinite(norm):
        engine.zero_grad()
        return norm, False
    engine.step()
    return norm, True


def seed_dropout(seed: int, step: int, rank: int, *micro_batch: int) -> None:
    """Seeds torch with the arguments, so that a resumed run repeats the same dropout.
    step: the training step. micro_batch: the number of the micro-batch, if there are micro-batches."""
    words = np.random.SeedSequence([seed, step, rank, *micro_batch]).generate_state(1, np.uint64)
    torch.manual_seed(int(words[0] >> 1))
