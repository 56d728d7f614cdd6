"""Runs the drill on a job that a batch system or another launcher starts and restarts.

The drill kills workers of the job on this machine. If the job uses several machines, run the drill on one or on all
of them. The job's launcher must restart the job with `--resume`. At the end, the drill compares the finished run with
an uninterrupted run.
"""

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path

from d2s.drill.compare import compare
from d2s.drill.kills import MOMENTS, DrillError, Kill, Tally, draw_kills
from d2s.drill.progress import finished, incomplete_checkpoints, last_step, metrics_version, saved_step
from d2s.drill.victims import kill as kill_processes
from d2s.drill.victims import workers_of
from d2s.workers.local_job import wait_until


def attach(options: argparse.Namespace) -> bool:
    """Kills the job's workers again and again, waits for the job to end, and prints the verdict.

    Returns whether the drill passed. Raises ValueError if the run is already finished. Raises DrillError if the
    job makes no progress.
    """
    run: Path = options.run
    if finished(run):
        raise ValueError(f"--run {run} is finished (it has last/): attach to a running job")
    start, tally, rng = time.monotonic(), Tally(), random.Random(options.seed)
    for kill in draw_kills(options.kills, options.seed):
        if not _kill(run, kill, rng.uniform(0, 2 * options.spread), options.patience):
            break
        tally.kills.append(kill)
        reached, saved = last_step(run), saved_step(run)
        tally.lost += max(0, reached - saved)
        print(
            f"kill {len(tally.kills)} of {options.kills}: {MOMENTS[kill.moment]}, at step {reached}; "
            f"has to go on from step {saved}",
            flush=True,
        )
    _await(run, lambda: False, options.patience)
    tally.restarts, tally.seconds = len(tally.kills), time.monotonic() - start
    print("\n".join(tally.lines(options.kills, run)))
    survived = len(tally.kills) == options.kills
    if options.against is None:
        print("finished; not compared: give --against RUN, or later --compare RUN RUN")
        return survived
    comparison = compare(run, options.against)
    print("\n".join(comparison.lines()))
    line, passed = comparison.verdict(fixed=len(set(options.workers)) == 1, tolerance=options.tolerance)
    print(line, flush=True)
    return passed and survived


def _kill(run: Path, kill: Kill, pause: float, patience: float) -> bool:
    """Waits for progress (see `_await`), then `pause` seconds, then kills. Returns whether a running job was hit."""
    before = metrics_version(run)
    if not _await(run, lambda: bool(workers_of(run)), patience):
        return False
    if kill.moment != "start":
        if not _await(run, lambda: metrics_version(run) != before, patience):
            return False
        if wait_until(lambda: finished(run), pause):
            return False
        old = incomplete_checkpoints(run).items()
        if kill.moment == "save" and not _await(
            run, lambda: bool(incomplete_checkpoints(run).items() - old), patience
        ):
            return False
    victims = kill.victims(workers_of(run))
    killed = bool(kill_processes(victims))
    wait_until(lambda: not set(victims) & set(workers_of(run)), patience)
    return killed and not finished(run)


def _await(run: Path, moment: Callable[[], bool], patience: float) -> bool:
    """Waits until `moment()` is true. Returns True then, or False if the run finishes first.

    Raises DrillError if the job writes no row of metrics and no checkpoint for `patience` seconds.
    """
    seen, since = None, time.monotonic()
    while not finished(run):
        if moment():
            return True
        now = (metrics_version(run), saved_step(run))
        if now != seen:
            seen, since = now, time.monotonic()
        if time.monotonic() - since > patience:
            raise DrillError(f"{run} got no further in {patience:.0f} s: is its launcher starting it again?")
        time.sleep(0.1)
    return False
