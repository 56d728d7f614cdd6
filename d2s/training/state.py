"""How far a run has come: everything in a checkpoint besides weights, moments and the configuration."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from d2s.data.damage import Damage, check_budget
from d2s.workers.collectives import sum_over_workers
from d2s.workers.group import Workers


@dataclass(kw_only=True)
class RunState:
    """Progress, counters and what was found so far."""

    damage: Damage
    """The damaged samples, to which the loader adds those that it meets."""
    step: int = 0
    """Optimization steps done, skipped ones included."""
    validation_pending: bool = False
    """Validation is due at this step and not done yet."""
    best: dict[str, float] = field(default_factory=dict)
    """rSum and step of the best model; empty before the first validation."""
    truncated: int = 0
    """Captions that this worker cut since it started."""
    truncated_before: int = 0
    """Captions that all workers cut before the run was resumed."""
    skipped: int = 0
    skipped_in_a_row: int = 0
    recent_losses: list[Tensor] = field(default_factory=list)
    """(total, align, distill), shape (3,), of each step since the last row of metrics, summed over workers."""

    def count_over_workers(self, workers: Workers, damage_budget: int) -> tuple[int, int]:
        """Damaged samples and cut captions of all workers, which call it together, since the run's first start.

        Raises ValueError, on every worker, where more samples are damaged than `damage_budget` allows.
        """
        counts = torch.tensor([self.damage.unshared, self.truncated], dtype=torch.int64)
        unshared, truncated = sum_over_workers(counts.to(workers.device)).tolist()
        if unshared:
            self.damage.share()
        check_budget(self.damage.known, damage_budget)
        return len(self.damage.known), truncated + self.truncated_before

    def to_dict(self, workers: Workers, damage_budget: int) -> dict[str, Any]:
        """The state as JSON types; all workers call it together. Raises as `count_over_workers` does."""
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
        """Continues from what `to_dict` gave. Earlier versions did not save every key."""
        self.step, self.validation_pending, self.best = saved["step"], saved["to_validate"], saved["best"]
        self.skipped, self.skipped_in_a_row = saved["skipped"], saved.get("skipped_in_a_row", 0)
        self.recent_losses = [torch.tensor(losses) for losses in saved.get("window", [])]
        self.truncated_before = saved["truncated"]
        self.damage.restore(saved.get("damaged_samples", []))
