"""Draws the kills of a drill from a seed, and counts how much training time the kills cost."""

import random
from dataclasses import dataclass, field
from pathlib import Path

from d2s.training.run_log import read_rows

MOMENTS = {"step": "after a step", "save": "while saving", "start": "at a start"}
# The moments of every ten kills. Only two are at a start, because little can be lost there.
_TEN = ["step"] * 4 + ["save"] * 4 + ["start"] * 2


class DrillError(Exception):
    """Raised if the training stops with an error that was not one of our kills, or gets stuck."""


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One kill. All fields are drawn before the drill starts. So a seed always gives the same kills."""

    moment: str
    """A key of MOMENTS, which says when to kill."""
    everyone: bool
    """Whether all workers are killed. If False, only one worker is killed."""
    where: float
    """In [0, 1): chooses the training step or, if `moment` is "start", the fraction of the start-up time."""
    delay: float
    """In [0, 1): time between the moment and the kill, as a fraction of the longest delay."""
    who: float
    """In [0, 1): chooses the worker if only one worker is killed."""

    def victims(self, workers: list[int]) -> list[int]:
        """Returns the process ids to kill. `workers` has the process ids of all workers."""
        return workers if self.everyone else workers[int(self.who * len(workers)) :][:1]


def draw_kills(count: int, seed: int) -> list[Kill]:
    rng = random.Random(seed)
    moments = [moment for _ in range(0, count, len(_TEN)) for moment in rng.sample(_TEN, len(_TEN))]
    return [
        Kill(
            moment=moment,
            everyone=rng.random() < 0.5,
            where=rng.random(),
            delay=rng.random(),
            who=rng.random(),
        )
        for moment in moments[:count]
    ]


def target_step(kill: Kill, seen: int, last: int, left: int) -> int:
    """Returns the training step after which to kill. It is later than `seen`, and leaves steps for later kills.

    Args:
        seen: the highest training step that was reached so far.
        last: the last training step that may be chosen. If `seen` is not earlier, `seen` + 1 is chosen.
        left: number of kills that remain, this one included.
    """
    return min(seen + 1 + int(kill.where * max((last - seen) // left, 1)), max(last, seen + 1))


@dataclass
class Tally:
    """Counts the events of a drill, such as kills, restarts and repeated training steps."""

    kills: list[Kill] = field(default_factory=list)
    restarts: int = 0
    lost: int = 0
    """Number of training steps that had to be repeated."""
    slowest: float = 0.0
    """The longest time, in seconds, from the kill of one worker until all other workers ended by themselves."""
    hung: int = 0
    """Number of kills of one worker, after a training step, after which the others did not end by themselves."""
    unmet: int = 0
    """Like `hung`, but for kills before the first training step: workers may not notice these."""
    seconds: float = 0.0
    """Time in seconds from the first start of the training to its end."""

    def lines(self, planned: int, run: Path) -> list[str]:
        """Returns the lines of the report. planned: number of kills asked for. run: the run folder."""
        moments = ", ".join(
            f"{sum(kill.moment == name for kill in self.kills)} {text}" for name, text in MOMENTS.items()
        )
        everyone = sum(kill.everyone for kill in self.kills)
        rows = {row["step"]: row["seconds"] for row in read_rows(run) if row["kind"] == "train"}
        useful = sum(rows.values()) / max(self.seconds, 1e-9)
        lines = [
            f"kills               {len(self.kills)} of {planned}: {moments}; "
            f"{len(self.kills) - everyone} of one worker, {everyone} of all",
            f"restarts            {self.restarts}",
            f"lost steps          {self.lost} done again, of {len(rows)}",
            f"effective time      {useful:.3f} of {self.seconds:.0f} s went into steps that "
            "counted; start-ups, saves and lost steps took the rest",
        ]
        if self.slowest:
            lines.append(f"survivors           ended by themselves within {self.slowest:.1f} s of a kill")
        if self.unmet:
            lines.append(
                f"before they met     {self.unmet} times the drill killed the others, as a launcher does"
            )
        if self.hung:
            lines.append(f"hung                {self.hung} times the drill had to kill survivors")
        return lines
