"""One run under fire: when it is killed, how it goes on, and what that has cost."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from d2s.checkpoint.store import newest
from d2s.training.run_log import read_rows
from d2s.workers import local_job as drill_job
from d2s.workers.local_job import Job
from d2s.workers.preemption import PREEMPTED

MOMENTS = {"step": "after a step", "save": "while saving", "start": "at a start"}
# Shares of the moments, exact in every ten kills. At a start little has been done yet that can be spoilt.
_TEN = ["step"] * 4 + ["save"] * 4 + ["start"] * 2
_WITHIN_STEP, _WITHIN_SAVE = 0.05, 0.2  # seconds after the moment was seen
_MEETING = 10.0  # seconds


class DrillError(Exception):
    """The drill cannot be ended: the training failed by itself, or got stuck."""


@dataclass(frozen=True, kw_only=True)
class Kill:
    """When and whom: all of it drawn beforehand, so that a seed names one drill."""

    moment: str
    everyone: bool
    where: float
    """In [0, 1): how far into the steps that are left for it, or into the start."""
    delay: float
    """In [0, 1): how long after the moment was seen."""
    who: float
    """In [0, 1): which worker."""


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
    """The step at which to strike: beyond what any incarnation has `seen`, with room for the kills that are `left`.

    last: no later than this moment. left: kills to come, this one included.
    """
    return min(seen + 1 + int(kill.where * max((last - seen) // left, 1)), max(last, seen + 1))


@dataclass
class Tally:
    """What has happened in a drill."""

    kills: list[Kill] = field(default_factory=list)
    restarts: int = 0
    lost: int = 0
    """Steps that had been done and were done again."""
    slowest: float = 0.0
    """Seconds that the survivors of a dead worker needed to end."""
    hung: int = 0
    """Times at which they had to be ended."""
    unmet: int = 0
    """Times at which they were ended because a worker had died before all of them had met."""
    seconds: float = 0.0

    def lines(self, planned: int, run: Path) -> list[str]:
        moments = ", ".join(
            f"{sum(kill.moment == name for kill in self.kills)} {text}" for name, text in MOMENTS.items()
        )
        everyone = sum(kill.everyone for kill in self.kills)
        rows = {row["step"]: row["seconds"] for row in read_rows(run) if row["kind"] == "train"}
        good = sum(rows.values())
        lines = [
            f"kills               {len(self.kills)} of {planned}: {moments}; "
            f"{len(self.kills) - everyone} of one worker, {everyone} of all",
            f"restarts            {self.restarts}",
            f"lost steps          {self.lost} done again, of {len(rows)}",
            f"effective time      {good / max(self.seconds, 1e-9):.3f} of {self.seconds:.0f} s went into steps that "
            "counted; start-ups, saves and lost steps took the rest",
        ]
        if self.slowest:
            lines.append(
                f"survivors           of a dead worker ended by themselves within {self.slowest:.1f} s"
            )
        if self.unmet:
            lines.append(f"before they met     {self.unmet} times the others were ended, as a launcher does")
        if self.hung:
            lines.append(f"hung                {self.hung} times survivors had to be ended")
        return lines


@dataclass(kw_only=True)
class Drill:
    """One run under fire."""

    arguments: list[str]
    """Of train.py, without --run."""
    run: Path
    logs: Path
    workers: Sequence[int]
    kills: Sequence[Kill]
    last: int
    """No kill is aimed at a later step."""
    launcher: str
    grace: float
    patience: float
    start_seconds: float
    tally: Tally = field(default_factory=Tally)

    def go(self) -> None:
        """Starts, kills and starts again, until the training is done."""
        start = time.monotonic()
        while not self._incarnation():
            self.tally.restarts += 1
        self.tally.seconds = time.monotonic() - start

    def _incarnation(self) -> bool:
        """From a start to an end; whether the training is done."""
        number = self.tally.restarts
        world = self.workers[number % len(self.workers)]
        log = self.logs / f"{self.run.name}-{number:03d}"
        from_step, before = saved_step(self.run), self._metrics()
        job = drill_job.start_job(self.arguments, self.run, world, log, self.launcher)
        try:
            done = len(self.tally.kills)
            struck = self._strike(job, self.kills[done]) if done < len(self.kills) else False
            if struck:
                self._bury(job, self.kills[done], self._metrics() != before)
            elif not job.wait(self.patience):
                raise DrillError(f"no end within {self.patience:.0f} s: {job.complaint()}")
        finally:
            job.end()
        codes = job.codes()
        if not any(codes):
            return True
        if not struck and PREEMPTED in codes:
            return False  # a batch system's doing, and no failure
        if not struck:
            raise DrillError(f"the training ended by itself with {codes}: {job.complaint()}")
        self.tally.kills.append(self.kills[done])
        reached = drill_job.last_step(self.run) if self._metrics() != before else from_step
        self.tally.lost += max(0, reached - saved_step(self.run))
        self._tell(self.kills[done], reached)
        return False

    def _strike(self, job: Job, kill: Kill) -> bool:
        """Waits for the moment and kills; False where the job ended before."""
        if kill.moment == "start":
            # A start may be quicker than the one that was measured: the first row, too, is no later than this moment.
            before, until = self._metrics(), job.started + kill.where * self.start_seconds
            self._await(job, lambda: time.monotonic() >= until or self._metrics() != before)
        else:
            left = len(self.kills) - len(self.tally.kills)
            target = target_step(kill, drill_job.last_step(self.run), self.last, left)
            self._await(job, lambda: drill_job.last_step(self.run) >= target)
            if kill.moment == "save":
                before = drill_job.hidden(self.run).items()
                self._await(job, lambda: bool(drill_job.hidden(self.run).items() - before))
            time.sleep(kill.delay * (_WITHIN_SAVE if kill.moment == "save" else _WITHIN_STEP))
        if job.ended():
            return False
        workers = job.workers()
        victims = workers if kill.everyone else workers[int(kill.who * len(workers)) :][:1]
        return bool(drill_job.kill(victims)) or self._strike_launcher(job)

    def _metrics(self) -> tuple[int, int, int]:
        return drill_job.signature(self.run / "metrics.jsonl")

    def _strike_launcher(self, job: Job) -> bool:
        """A launcher that has not started its workers yet dies in their place."""
        return job.launched and not job.ended() and bool(drill_job.kill([p.pid for p in job.processes]))

    def _await(self, job: Job, moment: Callable[[], bool]) -> None:
        if not drill_job.wait_until(lambda: job.ended() or moment(), self.patience):
            raise DrillError(f"nothing happened in {self.patience:.0f} s: {job.complaint()}")

    def _bury(self, job: Job, kill: Kill, trained: bool) -> None:
        """The survivors of a dead worker have to end by themselves.

        Before they have met they cannot know of each other's end: then the drill ends them, as a launcher does.
        """
        start = time.monotonic()
        ended = job.wait(self.grace if trained else min(self.grace, _MEETING))
        if kill.everyone or (len(job.logs) == 1 and not job.launched):
            return
        if ended:
            self.tally.slowest = max(self.tally.slowest, time.monotonic() - start)
        elif trained:
            self.tally.hung += 1
        else:
            self.tally.unmet += 1

    def _tell(self, kill: Kill, reached: int) -> None:
        whom = "all workers" if kill.everyone else "one worker"
        world = self.workers[(self.tally.restarts + 1) % len(self.workers)]
        print(
            f"kill {len(self.tally.kills)} of {len(self.kills)}: {whom} {MOMENTS[kill.moment]}, at step {reached}; "
            f"goes on from step {saved_step(self.run)} with {world}",
            flush=True,
        )


def saved_step(run: Path) -> int:
    """The step of the newest complete checkpoint, 0 where there is none."""
    found = newest(run)
    return int("".join(filter(str.isdigit, found.name))) if found else 0


def reference(
    arguments: list[str], run: Path, logs: Path, world: int, launcher: str, patience: float
) -> float:
    """Trains without a kill; returns the seconds from the start to the first step."""
    job = drill_job.start_job(arguments, run, world, logs / run.name, launcher)
    try:
        drill_job.wait_until(lambda: job.ended() or drill_job.last_step(run) > 0, patience)
        seconds = time.monotonic() - job.started
        if not job.wait(patience):
            raise DrillError(f"no end within {patience:.0f} s: {job.complaint()}")
        if any(job.codes()):
            raise DrillError(f"the training failed without a kill: {job.complaint()}")
    finally:
        job.end()
    return seconds
