"""Prints the steps of a pipeline or sweep, and the states, logs, errors and results of the jobs."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from d2s.common.files import read_json
from d2s.launchers.executors import Step
from d2s.launchers.jobs import Jobs
from d2s.launchers.states import LOGS


def print_tree(jobs: Jobs) -> None:
    """Prints the steps as a tree, with job numbers and first commands. A step stands below the step before it."""
    print(f"{jobs.folder}  ({jobs.resources.cluster})")
    for depth, step in enumerate(jobs.steps):
        number = f"  job {step.ids[0].split('_')[0]}" if step.ids else ""
        count = f" x {len(step.commands)}" if len(step.commands) > 1 else ""
        print(f"{'   ' * depth}`- {step.name}{count}{number}  {' '.join(step.commands[0])}", flush=True)


def print_states(jobs: Jobs) -> None:
    """Prints a line for each job, with the name of its step, its number and its state."""
    for step in jobs.steps:
        states = jobs.states(step)
        ids = step.ids if len(step.ids) == len(states) else [""] * len(states)
        for id_, state in zip(ids, states, strict=True):
            print(f"{step.name:<10} {id_:<12} {state}")


def print_logs(jobs: Jobs, name: str | None, rank: int, lines: int) -> None:
    """Prints the last `lines` lines (0: all lines) of the logs of `rank` in the step `name`.

    If `name` is None, the last step with output is used. Raises ValueError without such a step or any output.
    """
    names = [step.name for step in jobs.steps]
    if name and name not in names:
        raise ValueError(f"no step {name!r}; there are {', '.join(names)}")
    steps = [step for step in jobs.steps if name in (None, step.name)]
    with_output = [step for step in steps if any(_log_files(jobs, step, rank))]
    if not with_output:
        states = ", ".join(f"{step.name} is {jobs.states(step)[0]}" for step in steps)
        raise ValueError(f"nothing was printed yet as rank {rank}: {states}")
    for path in _log_files(jobs, with_output[-1], rank):
        print("\n".join([f"==> {path}", *_lines(path)[-lines:]]))


def _log_files(jobs: Jobs, step: Step, rank: int = 0) -> Iterator[Path]:
    """Yields the paths of the existing log files of a rank, for all jobs of a step."""
    paths = (jobs.folder / LOGS / f"{id_}_{rank}_log.{kind}" for id_ in step.ids for kind in ("out", "err"))
    return (path for path in paths if path.is_file())


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


def print_evaluation(jobs: Jobs) -> None:
    """Prints the result table of a pipeline, from the log of its last step, the evaluation."""
    outputs = [path for path in _log_files(jobs, jobs.steps[-1]) if path.suffix == ".out"]
    for path in outputs[-1:]:
        print("\n".join(line for line in _lines(path) if not line.startswith("submitit ")))


def print_errors(jobs: Jobs, step: Step) -> None:
    """Prints the paths of the logs of a step, each with the last three error messages in this log."""
    for path in _log_files(jobs, step):
        print("\n".join([f"==> {path}", *list(filter(is_error_message, _lines(path)))[-3:]]))


def is_error_message(line: str) -> bool:
    """Returns whether a line is an error message or the last line of a traceback. Ignores messages of SLURM."""
    # The exception that `Command` raises only points to the lines above it.
    uninformative = line.startswith(("srun:", "slurm")) or line.endswith("see the lines above")
    return not uninformative and re.search(r"error(:|$)", line, re.IGNORECASE) is not None


def print_sweep(points: list[dict[str, str]], out: Path) -> None:
    """Prints the best validation rSum of each grid point. The test split must not be used to choose a grid point."""
    runs = [out / f"run-{number}" for number in range(len(points))]
    scores = [_scores(run) for run in runs]
    best = max((score for score, *_ in scores if score is not None), default=None)
    table = Table(*points[0], "val rSum", "at step", "steps", "run", "")
    for point, run, (score, *steps) in zip(points, runs, scores, strict=True):
        cells = ["-" if score is None else f"{score:.1f}", *("-" if n is None else str(n) for n in steps)]
        mark = "best" if score is not None and score == best else ""
        table.add_row(*point.values(), *cells, str(run), mark)
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(table)


def _scores(run: Path) -> tuple[float | None, int | None, int | None]:
    """Returns a run's best validation rSum, the training step of this rSum, and the last saved training step."""
    markers = sorted(run.glob("checkpoints/step-*/complete.json"))
    if not markers:
        return None, None, None
    state = read_json(markers[-1])
    best = state.get("best") or {}
    return best.get("rsum"), best.get("step"), state.get("step")
