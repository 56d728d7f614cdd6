"""Defines the progress of a run, which is saved in checkpoints beside weights, optimizer and configuration."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from d2s.data.damage import Damage, check_budget
from d2s.workers.collectives import sum_over_workers
from d2s.workers.group import Workers


@dataclass(kw_only=True)
class RunState:
    """The progress and the counters of a run."""

    damage: Damage
    """The damaged samples found so far."""
    step: int = 0
    """How many training steps are done, including skipped ones."""
    validation_pending: bool = False
    """True if validation is due at this training step, but not done yet."""
    best: dict[str, float] = field(default_factory=dict)
    """The best model's "rsum" (sum of recalls) and training "step". Empty before the first validation."""
    truncated: int = 0
    """How many captions this worker has cut to the maximum length since it started."""
    truncated_before: int = 0
    """How many captions all workers together had cut before the run was resumed."""
    skipped: int = 0
    skipped_in_a_row: int = 0
    recent_losses: list[Tensor] = field(default_factory=list)
    """A tensor of shape (3,) for each training step since the last row of metrics. It contains total, align and
    distill of the global batch."""

    def count_over_workers(self, workers: Workers, damage_budget: int) -> tuple[int, int]:
        """Returns how many samples were damaged, and how many captions were cut, on all workers since the run began.
        All workers call this together. Raises ValueError, on all workers, if more than `damage_budget` samples are
        damaged."""
        counts = torch.tensor([self.damage.unshared, self.truncated], dtype=torch.int64)
        unshared, truncated = sum_over_workers(counts.to(workers.device)).tolist()
        if unshared:
            self.damage.share()
        check_budget(self.damage.known, damage_budget)
        return len(self.damage.known), truncated + self.truncated_before

    def to_dict(self, workers: Workers, damage_budget: int) -> dict[str, Any]:
        """Returns the state in JSON types. All workers call this together. Raises as `count_over_workers` does."""
        damaged, truncated = self.count_over_workers(workers, damage_budget)
        return {
            "step": self.step,
            "to_validate": self.validation_pending,
            "best": self.best,
            "damaged": damaged,
            "damaged_samples": self.damage.known,
            "truncated": truncated,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "window": [losses.tolist() for losses in self.recent_losses],
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Restores the state that `to_dict` returned. Earlier versions did not save all keys."""
        self.step, self.validation_pending, self.best = saved["step"], saved["to_validate"], saved["best"]
        self.skipped, self.skipped_in_a_row = saved["skipped"], saved.get("skipped_in_a_row", 0)
        self.recent_losses = [torch.tensor(losses) for losses in saved.get("window", [])]
        self.truncated_before = saved["truncated"]
        self.damage.restore(saved.get("damaged_samples", []))
