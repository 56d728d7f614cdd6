"""Draws the kills of a drill from its seed, and counts how much of the training they cost."""

import random
from dataclasses import dataclass, field
from pathlib import Path

from d2s.training.run_log import read_rows

MOMENTS = {"step": "after a step", "save": "while saving", "start": "at a start"}
# The moments of every ten kills. Few are at a start, because little can be lost there.
_TEN = ["step"] * 4 + ["save"] * 4 + ["start"] * 2


class DrillError(Exception):
    """Raised if the drill cannot go on, because the training failed by itself or got stuck."""


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One kill. All fields are drawn before the drill starts, so that a seed always gives the same kills."""

    moment: str
    """When to kill: a key of MOMENTS."""
    everyone: bool
    """Whether all workers are killed, or only one."""
    where: float
    """In [0, 1): position of the kill among the steps that it may hit or, for "start", in the start-up time."""
    delay: float
    """In [0, 1): time from seeing the moment to the kill, as a share of the longest delay."""
    who: float
    """In [0, 1): chooses the worker if only one is killed."""

    def victims(self, workers: list[int]) -> list[int]:
        """Returns the process numbers to kill, out of the process numbers of all workers."""
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
    """Returns the step after which to kill: later than `seen`, and early enough for the kills that follow.

    Args:
        seen: the highest step that the training has reached so far.
        last: the last step that may be chosen, unless `seen` is later.
        left: number of kills still to make, this one included.
    """
    return min(seen + 1 + int(kill.where * max((last - seen) // left, 1)), max(last, seen + 1))


@dataclass
class Tally:
    """Counts what happened in a drill."""

    kills: list[Kill] = field(default_factory=list)
    restarts: int = 0
    lost: int = 0
    """Number of training steps that had to be done again."""
    slowest: float = 0.0
    """Longest time in seconds from the kill of one worker until all other workers had ended by themselves."""
    hung: int = 0
    """Number of kills of one worker after which the other workers did not end by themselves."""
    unmet: int = 0
    """Number of kills of one worker before the process group was formed, so that the drill killed the others."""
    seconds: float = 0.0

    def lines(self, planned: int, run: Path) -> list[str]:
        """Returns the lines of the report for a drill of `planned` kills, which trained into `run`."""
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
