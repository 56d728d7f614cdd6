"""Drills a job that somebody else started and starts again: a batch system's, or a launcher's with restarts.

Workers of the job on this machine are killed; where a job has several machines, run it on one or on each of them.
The job's own launcher has to bring it back with `--resume`. Once it is done it is compared with a run left in peace.
"""

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path

from d2s.drill.compare import compare
from d2s.drill.kill_loop import MOMENTS, DrillError, Kill, Tally, draw_kills, saved_step
from d2s.workers import local_job as drill_job


def finished(run: Path) -> bool:
    return (run / "last" / "model.safetensors").is_file()


def attach(options: argparse.Namespace) -> bool:
    """Kills `options.kills` times, waits for the end of the job, prints the verdict; whether it is a yes.

    Raises ValueError where the run is finished already, DrillError where the job gets no further.
    """
    from d2s.drill.command import verdict

    run: Path = options.run
    if finished(run):
        raise ValueError(f"--run {run} is finished (it has last/): attach to a running job")
    start, tally, rng = time.monotonic(), Tally(), random.Random(options.seed)
    for kill in draw_kills(options.kills, options.seed):
        if not _strike(run, kill, rng.uniform(0, 2 * options.spread), options.patience):
            break
        tally.kills.append(kill)
        reached, saved = drill_job.last_step(run), saved_step(run)
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
    line, good = verdict(comparison, fixed=len(set(options.workers)) == 1, tolerance=options.tolerance)
    print(line, flush=True)
    return good and survived


def _strike(run: Path, kill: Kill, pause: float, patience: float) -> bool:
    """Waits until the job gets on again, and `pause` seconds more, and kills; False where the job ended before."""
    before = drill_job.signature(run / "metrics.jsonl")
    if not _await(run, lambda: bool(drill_job.workers_of(run)), patience):
        return False
    if kill.moment != "start":
        if not _await(run, lambda: drill_job.signature(run / "metrics.jsonl") != before, patience):
            return False
        if drill_job.wait_until(lambda: finished(run), pause):
            return False
        saving = drill_job.hidden(run).items()
        if kill.moment == "save" and not _await(
            run, lambda: bool(drill_job.hidden(run).items() - saving), patience
        ):
            return False
    workers = drill_job.workers_of(run)
    victims = workers if kill.everyone else workers[int(kill.who * len(workers)) :][:1]
    hit = bool(drill_job.kill(victims))
    drill_job.wait_until(lambda: not set(victims) & set(drill_job.workers_of(run)), patience)
    return hit and not finished(run)


def _await(run: Path, moment: Callable[[], bool], patience: float) -> bool:
    """Whether the moment came; False where the run was finished before.

    Raises DrillError after `patience` seconds in which the job wrote no row and no checkpoint.
    """
    seen, since = None, time.monotonic()
    while not finished(run):
        if moment():
            return True
        now = (drill_job.signature(run / "metrics.jsonl"), saved_step(run))
        if now != seen:
            seen, since = now, time.monotonic()
        if time.monotonic() - since > patience:
            raise DrillError(f"{run} got no further in {patience:.0f} s: is its launcher starting it again?")
        time.sleep(0.1)
    return False
