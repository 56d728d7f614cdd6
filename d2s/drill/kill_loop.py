"""Starts, kills and restarts a training until the training is done."""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from d2s.drill.kills import MOMENTS, DrillError, Kill, Tally, draw_kills, target_step
from d2s.drill.progress import incomplete_checkpoints, last_step, metrics_version, saved_step
from d2s.drill.victims import kill as kill_processes
from d2s.drill.victims import workers_of
from d2s.workers.local_job import LocalJob, start_job, wait_until
from d2s.workers.preemption import PREEMPTED

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
# The longest delay, in seconds, after the drill sees the moment of a kill. The keys are values of `Kill.moment`.
_DELAY = {"step": 0.05, "save": 0.2}
_SECONDS_TO_MEET = 10.0


def start_training(arguments: Sequence[str], run: Path, workers: int, log: Path, launcher: str) -> LocalJob:
    """Starts `train.py ARGUMENTS --run RUN --resume`. `start_job` explains the other parameters."""
    return start_job([str(TRAIN), *arguments, "--run", str(run), "--resume"], workers, log, launcher)


def train_reference(arguments: Sequence[str], run: Path, logs: Path, options: argparse.Namespace) -> float:
    """Trains into `run` without a kill. Returns the seconds from the start to the end of the first training step.

    Raises DrillError if the training fails or does not end.
    """
    job = start_training(arguments, run, options.workers[0], logs / run.name, options.launcher)
    try:
        wait_until(lambda: job.ended() or last_step(run) > 0, options.patience)
        seconds = time.monotonic() - job.started
        if not job.wait(options.patience):
            raise DrillError(f"no end within {options.patience:.0f} s: {job.error()}")
        if any(job.codes()):
            raise DrillError(f"the training failed without a kill: {job.error()}")
    finally:
        job.end()
    return seconds


@dataclass(kw_only=True)
class KillLoop:
    """A training that is killed and restarted until it is done."""

    arguments: list[str]
    """The arguments of train.py, without --run."""
    run: Path
    logs: Path
    options: argparse.Namespace
    """The drill's options. This class uses workers, kills, seed, steps, save_steps, launcher, grace and patience."""
    start_seconds: float
    """Seconds from a start of the training to the end of the first training step."""
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        self.workers, self.patience = self.options.workers, self.options.patience
        self.kills = draw_kills(self.options.kills, self.options.seed)

    def go(self) -> None:
        """Starts, kills and restarts the training until it is done.

        Raises DrillError if the training gets stuck, or stops with an error that was not one of our kills.
        """
        start = time.monotonic()
        while not self._start_once():
            self.tally.restarts += 1
        self.tally.seconds = time.monotonic() - start

    def _start_once(self) -> bool:
        """Starts the training once and waits until it is killed or ends. Returns whether the training is done."""
        number = self.tally.restarts
        workers = self.workers[number % len(self.workers)]
        log = self.logs / f"{self.run.name}-{number:03d}"
        from_step, before = saved_step(self.run), metrics_version(self.run)
        job = start_training(self.arguments, self.run, workers, log, self.options.launcher)
        try:
            done = len(self.tally.kills)
            kill = self.kills[done] if done < len(self.kills) else None
            killed = kill is not None and self._kill(job, kill)
            if killed:
                self._wait_for_survivors(job, kill, trained=metrics_version(self.run) != before)
            elif not job.wait(self.patience):
                raise DrillError(f"no end within {self.patience:.0f} s: {job.error()}")
        finally:
            job.end()
        codes = job.codes()
        if not any(codes):
            return True
        if not killed and PREEMPTED in codes:
            return False  # A batch system stopped the training. This is no failure.
        if not killed:
            raise DrillError(f"the training ended by itself with {codes}: {job.error()}")
        self.tally.kills.append(kill)
        reached = last_step(self.run) if metrics_version(self.run) != before else from_step
        self.tally.lost += max(0, reached - saved_step(self.run))
        self._print(kill, reached)
        return False

    def _kill(self, job: LocalJob, kill: Kill) -> bool:
        """Waits for the moment of `kill`, then kills. Returns whether a process was killed before the job ended."""
        if kill.moment == "start":
            # The wait also ends at the first row of metrics, because this start may be faster than `start_seconds`.
            before, until = metrics_version(self.run), job.started + kill.where * self.start_seconds
            self._await(job, lambda: time.monotonic() >= until or metrics_version(self.run) != before)
        else:
            left = len(self.kills) - len(self.tally.kills)
            last = self.options.steps - self.options.save_steps - 2
            target = target_step(kill, last_step(self.run), last, left)
            self._await(job, lambda: last_step(self.run) >= target)
            if kill.moment == "save":
                old = incomplete_checkpoints(self.run).items()
                self._await(job, lambda: bool(incomplete_checkpoints(self.run).items() - old))
            time.sleep(kill.delay * _DELAY[kill.moment])
        if job.ended():
            return False
        workers = workers_of(self.run) if job.launched else job.pids()
        if kill_processes(kill.victims(workers)):
            return True
        # If a launcher has not started its workers yet, the launcher is killed instead.
        return job.launched and bool(kill_processes(job.pids()))

    def _await(self, job: LocalJob, moment: Callable[[], bool]) -> None:
        if not wait_until(lambda: job.ended() or moment(), self.patience):
            raise DrillError(f"nothing happened in {self.patience:.0f} s: {job.error()}")

    def _wait_for_survivors(self, job: LocalJob, kill: Kill, *, trained: bool) -> None:
        """Waits until the surviving workers end by themselves after one was killed. Counts the outcome in `tally`.

        trained: whether this start reached a training step. If False, the process group may not exist yet, and the
            survivors cannot notice the kill. The drill then waits only 10 s before it kills them, as launchers do.
        """
        start = time.monotonic()
        ended = job.wait(min(self.options.grace, math.inf if trained else _SECONDS_TO_MEET))
        if kill.everyone or (len(job.logs) == 1 and not job.launched):
            return
        if ended:
            self.tally.slowest = max(self.tally.slowest, time.monotonic() - start)
        elif trained:
            self.tally.hung += 1
        else:
            self.tally.unmet += 1

    def _print(self, kill: Kill, reached: int) -> None:
        victims = "all workers" if kill.everyone else "one worker"
        workers = self.workers[(self.tally.restarts + 1) % len(self.workers)]
        print(
            f"kill {len(self.tally.kills)} of {len(self.kills)}: {victims} {MOMENTS[kill.moment]}, "
            f"at step {reached}; goes on from step {saved_step(self.run)} with {workers}",
            flush=True,
        )
