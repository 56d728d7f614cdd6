"""Which kills a drill makes, drawn from its seed, and what they cost the training."""

import random
from dataclasses import dataclass, field
from pathlib import Path

from d2s.training.run_log import read_rows

MOMENTS = {"step": "after a step", "save": "while saving", "start": "at a start"}
# Of every ten kills. Few are at a start, where there is little yet that a kill could spoil.
_TEN = ["step"] * 4 + ["save"] * 4 + ["start"] * 2


class DrillError(Exception):
    """The drill cannot go on: the training failed by itself, or got stuck."""


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One kill. All of it is drawn beforehand, so that a seed always gives the same drill."""

    moment: str
    """A key of MOMENTS."""
    everyone: bool
    """All workers are killed, or only one."""
    where: float
    """In [0, 1): how far into the steps that this kill may be aimed at, or into the start."""
    delay: float
    """In [0, 1): how long after the moment was seen."""
    who: float
    """In [0, 1): which worker."""

    def victims(self, workers: list[int]) -> list[int]:
        """Those of the workers' process numbers that are killed."""
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
    """The step after which to kill: a new one, early enough to leave steps for the other kills.

    Args:
        seen: the highest step that any start has reached.
        last: no later step is aimed at.
        left: kills to come, this one included.
    """
    return min(seen + 1 + int(kill.where * max((last - seen) // left, 1)), max(last, seen + 1))


@dataclass
class Tally:
    """What happened in a drill."""

    kills: list[Kill] = field(default_factory=list)
    restarts: int = 0
    lost: int = 0
    """Steps that had to be done again."""
    slowest: float = 0.0
    """Seconds until the last survivor of a killed worker ended by itself, at most."""
    hung: int = 0
    """How often survivors did not end by themselves."""
    unmet: int = 0
    """How often survivors were killed because one worker died before the group was formed."""
    seconds: float = 0.0

    def lines(self, planned: int, run: Path) -> list[str]:
        """The report, for a drill of `planned` kills on `run`."""
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
