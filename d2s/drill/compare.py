"""Compares every loss and the final weights of two finished runs, bit by bit or within a tolerance."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from d2s.training.run_log import read_rows

COMPARED = ("loss", "align", "distill", "lr", "grad_norm")
TOLERANCE = 1e-4
"""Largest relative difference that is allowed if the number of workers changed during the drill.

The number of workers decides in which order floating-point numbers are summed. At the drill's own learning rate, a
different order changes a loss by about 3e-6. A restart that loses AdamW's first moments changes a loss by 5e-2.
"""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The differences between a run and the other run, with which `compare` compared it."""

    steps: int
    """Number of training steps that both runs recorded."""
    missing: tuple[int, ...]
    """Training steps that only one of the two runs recorded."""
    loss: float
    """Largest difference between the two losses of a training step, relative to the other run's loss."""
    loss_step: int
    """The training step at which the losses differ most, or 0 if all losses are equal."""
    weights: float
    """L2 norm of the difference between the final weights, relative to the L2 norm of the other run's weights."""
    unlike: tuple[str, ...]
    """Names of all logged numbers ("step 3 loss") and weight tensors that are not bit-equal."""

    @property
    def bit_equal(self) -> bool:
        return not self.unlike and not self.missing

    def within(self, tolerance: float) -> bool:
        """Returns whether the runs recorded the same steps, and losses and weights differ by at most `tolerance`."""
        return not self.missing and self.loss <= tolerance and self.weights <= tolerance

    def lines(self) -> list[str]:
        """Returns the lines of the report, without the verdict."""
        found = [f"compared            {self.steps} steps, and the weights of last/"]
        if self.missing:
            found.append(f"missing             {_some([str(step) for step in self.missing])} of one run")
        if self.unlike:
            found.append(f"not bit-equal       {_some(self.unlike)}")
        return found

    def verdict(self, *, fixed: bool, tolerance: float) -> tuple[str, bool]:
        """Returns the last line of a drill's report, and whether the drill passed.

        fixed: whether the number of workers never changed. If True, the drill passes only if the runs are bit-equal.
        tolerance: the largest relative difference that passes if `fixed` is False.
        """
        passed = self.bit_equal if fixed else self.within(tolerance)
        answer = "yes" if passed else "no"
        if fixed:
            return f"bit-equal: {answer}", passed
        return (
            f"largest difference {self.loss:.1e} of a loss (step {self.loss_step}), "
            f"{self.weights:.1e} of the weights, within tolerance {tolerance:.0e}: {answer}"
        ), passed


def compare(run: Path, other: Path) -> Comparison:
    """Compares two finished runs. If metrics.jsonl has several rows for a training step, the last row counts.

    Raises ValueError if a run is not finished, or if a folder is no run.
    """
    ours, theirs = _rows(run), _rows(other)
    steps = sorted(ours.keys() & theirs.keys())
    unlike, largest, where = [], 0.0, 0
    for step in steps:
        for name in COMPARED:
            # The numbers are compared as text, because NaN is not equal to NaN as a number.
            if repr(ours[step].get(name)) != repr(theirs[step].get(name)):
                unlike.append(f"step {step} {name}")
        difference = _relative(ours[step]["loss"], theirs[step]["loss"])
        if difference > largest:
            largest, where = difference, step
    far, tensors = _weights(run, other)
    return Comparison(
        steps=len(steps),
        missing=tuple(sorted(ours.keys() ^ theirs.keys())),
        loss=largest,
        loss_step=where,
        weights=far,
        unlike=(*unlike, *tensors),
    )


def recorded_steps(run: Path) -> set[int]:
    """Returns the training steps that a finished run recorded. Raises ValueError as `compare` does."""
    steps = set(_rows(run))
    _weights_file(run)
    return steps


def _rows(run: Path) -> dict[int, dict[str, Any]]:
    rows = {row["step"]: row for row in read_rows(run) if row["kind"] == "train"}
    if not rows:
        raise ValueError(f"{run} holds no row of training in metrics.jsonl: name the folder of a run")
    return rows


def _relative(a: float, b: float) -> float:
    if repr(a) == repr(b):
        return 0.0
    difference = abs(a - b) / max(abs(b), 1e-12)
    return difference if math.isfinite(difference) else math.inf


def _weights(run: Path, other: Path) -> tuple[float, list[str]]:
    """Returns `Comparison.weights`, and the names of the tensors that differ in shape, type or values."""
    from safetensors.numpy import load_file

    ours, theirs = load_file(_weights_file(run)), load_file(_weights_file(other))
    if ours.keys() != theirs.keys():
        return math.inf, sorted(ours.keys() ^ theirs.keys())
    unlike, difference, norm = [], 0.0, 0.0
    for name, b in theirs.items():
        a = ours[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            return math.inf, [name]
        if a.tobytes() != b.tobytes():
            unlike.append(name)
            difference += float(np.square(a.astype(np.float64) - b).sum())
        norm += float(np.square(b.astype(np.float64)).sum())
    far = math.sqrt(difference) / max(math.sqrt(norm), 1e-12)
    return far if math.isfinite(far) else math.inf, unlike


def _weights_file(run: Path) -> Path:
    path = run / "last" / "model.safetensors"
    if not path.is_file():
        raise ValueError(f"{run} is not finished (no last/model.safetensors): end it with --resume")
    return path


def _some(names: tuple[str, ...] | list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
