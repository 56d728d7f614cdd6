"""The training loop.

The result of a run depends only on its configuration and its data. In each training step the workers exchange numbers
once. They agree whether the loss is finite, whether a worker got a stop signal, and whether a checkpoint is due.
"""

import time
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from d2s.data.batch import Batch
from d2s.training.nonfinite import report
from d2s.training.optimizer import lr_factor, set_learning_rate
from d2s.training.run import Run
from d2s.training.step import clip_and_step
from d2s.workers.collectives import barrier, sum_over_workers
from d2s.workers.preemption import Preempted


class Agreement(NamedTuple):
    """The result of the workers' exchange in a training step. All workers have the same result."""

    finite: bool
    """Whether the losses of all workers are finite."""
    stop: bool
    """Whether a worker got a stop signal."""
    save: bool
    """Whether the newest checkpoint is older than checkpoint.every_minutes, by the first worker's clock."""
    losses: Tensor
    """The losses total, align and distill of the global batch, of shape (3,), on the CPU."""


class Trainer(Run):
    """A run with the training loop."""

    def train(self) -> None:
        """Trains from training step `state.step` to the last, and then exports the model to the folder `last`.

        After a stop signal, writes a checkpoint of the current step and raises Preempted, on all workers together.
        """
        try:
            self._train()
        except Preempted:
            if self.saved_step != self.state.step:
                self.save()
            raise
        self.export("last")
        barrier()

    def _train(self) -> None:
        config, state, steps_per_epoch = self.config, self.state, self.batches.steps_per_epoch
        if state.validation_pending:  # the run was stopped between a checkpoint and its validation
            self.validate()
        while state.step < self.total_steps:
            self.preemption.check()
            self.engine.train()
            self.timed_from = (state.step, time.monotonic())
            epoch, start = divmod(state.step, steps_per_epoch)
            steps = min(steps_per_epoch - start, self.total_steps - state.step)
            for batch in islice(self.batches.epoch(epoch, start), steps):
                factor = lr_factor(config.optim, state.step, steps_per_epoch, self.total_steps)
                set_learning_rate(self.engine.optimizer, factor)
                agreed = self.train_step(batch)
                state.step += 1
                last, epoch_ends = state.step == self.total_steps, state.step % steps_per_epoch == 0
                if last or state.step % config.log.every == 0:
                    self.log_row(factor)
                every = config.checkpoint.every_steps
                if last or (epoch_ends and (epoch + 1) % config.validation.every_epochs == 0):
                    state.validation_pending = True
                    self.save()
                    self.validate()
                elif agreed.save or (every and state.step % every == 0):
                    self.save()
                if agreed.stop:
                    break  # self.preemption.check() above raises Preempted on all workers

    def train_step(self, batch: Batch) -> Agreement:
        """Makes one training step. All workers skip the update if the loss or the gradient is not finite.
        batch: this worker's part of the global batch."""
        for line in self.state.damage.new_lines():  # each worker reports the samples that it read
            self.log.say(f"damaged sample replaced: {line}")
        self.statistics.snapshot()
        losses = self.computation.forward(batch, self.state.step, self.hinge_warmup())
        agreed = self.agree(torch.stack(list(losses)).detach())
        applied = False
        if agreed.finite:
            self.computation.backward(losses[0])
            self.grad_norm, applied = clip_and_step(self.engine)
        if applied:
            self.statistics.keep_finite()
            self.state.skipped_in_a_row = 0
            self.detector.stop()
        else:
            self.statistics.restore()
            self.count_skipped(batch, losses[0], what="gradient" if agreed.finite else "loss")
        # Count captions at the end. If a stop signal drops the step, only the resumed run must count them.
        self.state.truncated += batch.truncated
        self.state.recent_losses.append(agreed.losses)
        return agreed

    def agree(self, losses: Tensor) -> Agreement:
        """Exchanges losses, stop signals and due checkpoints with the other workers. All workers call this together.

        losses: this worker's parts of total, align and distill, of shape (3,), without gradient.
        """
        minutes = self.config.checkpoint.every_minutes
        save = self.workers.is_main and minutes and time.monotonic() - self.saved_at >= 60 * minutes
        flags = losses.new_tensor([bool(self.preemption.received), bool(save)])
        nonfinite = ~torch.isfinite(losses[:1])
        sums = sum_over_workers(torch.cat([nonfinite.to(losses.dtype), flags, losses])).cpu()
        nonfinite, stop, save = (bool(flag) for flag in sums[:3].tolist())
        return Agreement(not nonfinite, stop, save, sums[3:])

    def hinge_warmup(self) -> float:
        """Returns the progress of the hinge's warm-up at this training step: above 0, and 1 after the warm-up."""
        steps = self.config.loss.warmup_epochs * self.batches.steps_per_epoch
        return (self.state.step + 1) / steps if self.state.step < steps else 1.0

    def count_skipped(self, batch: Batch, total: Tensor, *, what: str) -> None:
        """Counts a training step that all workers skip.

        batch: the batch of the step. total: this worker's loss. what: "loss" or "gradient", whichever is not finite.
        Raises FloatingPointError, on all workers, after config.nonfinite_limit skipped steps in a row.
        """
        state = self.state
        state.skipped += 1
        state.skipped_in_a_row += 1
        if state.skipped_in_a_row < self.config.nonfinite_limit:
            self.detector.start()
            return
        rows = [row for row in batch.samples.tolist() if row >= 0]  # samples of a stream have row -1
        evidence = 2 if self.detector.found_any() else int(not torch.isfinite(total).item())
        raise FloatingPointError(report(what, state.skipped_in_a_row, evidence, self.index.keys(rows)))
