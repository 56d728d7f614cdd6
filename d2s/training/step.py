"""The parts of one optimization step: losses and gradients of a global batch, and the update.

:class:`WholeBatch` embeds all pairs of a worker at once, :class:`d2s.training.gradient_cache.MicroBatches` a few at a
time; both give the gradient of the global batch.
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
    """Forward and backward pass of a worker's part of a batch.

    engine: DeepSpeed's, around a TrainingModule. teacher: needed where the objective distills.
    """

    def __init__(
        self, engine: Any, teacher: Teacher | TeacherTable | None, workers: Workers, seed: int
    ) -> None:
        self.engine, self.teacher, self.workers, self.seed = engine, teacher, workers, seed

    def forward(self, batch: Batch, step: int, warmup: float) -> tuple[Tensor, Tensor, Tensor]:
        """This worker's share of (total, align, distill), 0-dim; total has a gradient.

        step: decides the dropout. warmup: progress of the hinge's sum form, 1 once it is over.
        """
        seed_dropout(self.seed, step, self.workers.rank)
        batch = batch.to(self.workers.device)
        return self.engine(batch, warmup, self.teacher_embeddings(batch))

    def backward(self, total: Tensor) -> None:
        """Leaves the gradient of the global loss in the engine. total: the first value of `forward`."""
        # The engine averages gradients over workers, and the loss is the sum of their shares.
        self.engine.backward(total * self.workers.world)

    def teacher_embeddings(self, batch: Batch) -> Tensor | None:
        """Embeddings (B, D) of the dense captions of a batch on the device; None without distillation."""
        if self.teacher is None:
            return None
        if isinstance(self.teacher, TeacherTable):
            return self.teacher.rows(batch.dense_index).to(self.workers.device)
        with torch.no_grad():
            return self.teacher(batch.dense_ids, batch.dense_mask)


def clip_and_step(engine: Any) -> tuple[float, bool]:
    """Clips the gradient and applies it. Returns its norm over all workers, and whether it was applied.

    A gradient whose norm is not finite is dropped on all workers and changes neither weights nor moments.
    """
    if engine.zero_optimization():
        # ZeRO tests the norm over all workers before it changes a weight or a moment.
        engine.step()
        return float(engine.get_global_grad_norm() or 0.0), engine.was_step_applied()
    # Without ZeRO every worker holds the whole gradient, identical to the last bit.
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients).item()
    if not math.isfinite(norm):
        engine.zero_grad()
        return norm, False
    engine.step()
    return norm, True


def seed_dropout(seed: int, step: int, rank: int, *micro_batch: int) -> None:
    """Seeds torch from (seed, step, rank, micro-batch), so that a resumed run repeats the same dropout."""
    words = np.random.SeedSequence([seed, step, rank, *micro_batch]).generate_state(1, np.uint64)
    torch.manual_seed(int(words[0] >> 1))
