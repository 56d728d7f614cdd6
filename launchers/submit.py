"""`python -m d2s.launchers.submit pipeline | sweep | status | logs | cancel | resume`: jobs through submitit.

A pipeline builds shards, pre-trains, fine-tunes and evaluates, each job waiting for the one before; a sweep trains
one recipe over a grid of settings. `--cluster slurm` submits them all at once; `--cluster local` runs them here,
one after the other. A job that runs out of time or is preempted writes a checkpoint on all ranks together and
goes on from there; one that comes no further between its starts stops with the reason.
"""

import argparse
import dataclasses
import re
import shlex
import shutil
import sys
from pathlib import Path

import torch

from d2s.common.command import Parser, run
from d2s.common.files import read_json, write_json
from d2s.launchers.executors import Resources, Step, dump
from d2s.launchers.jobs import Jobs, logs_of
from d2s.launchers.pipeline import pipeline, source, sweep, sweep_table

POINTS = "grid.json"
EXAMPLES = """\
examples:
  python -m d2s.launchers.submit pipeline f30k_vitb16_384 --data data/f30k --out runs/f30k --nodes 2 --tasks 8
  python -m d2s.launchers.submit pipeline --cluster local --out runs/scenes
  python -m d2s.launchers.submit sweep f30k_vitb16_384_finetune --data data/f30k --init runs/f30k/pretrain \\
      --grid optim.lr=1e-4,2e-4 --grid loss.distill_weight=0,64 --out runs/sweep
  python -m d2s.launchers.submit status runs/sweep
"""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m d2s.launchers.submit",
        description="Chains of jobs, on a SLURM cluster or on this machine.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chain = commands.add_parser("pipeline", help="shards, pre-training, fine-tuning, evaluation")
    chain.add_argument("recipe", nargs="?", default="scenes_small", metavar="RECIPE",
                       help="what the two recipes' names begin with (default: scenes_small)")  # fmt: skip
    _add_common(chain)
    grid = commands.add_parser("sweep", help="one recipe over a grid of settings, as a job array")
    grid.add_argument("recipe", metavar="RECIPE")
    grid.add_argument(
        "--grid", action="append", default=[], metavar="FIELD=V1,V2", help="values of a field; repeat"
    )
    grid.add_argument(
        "--init", type=Path, metavar="DIR", help="stage-1 run to start from; by default one is trained"
    )
    _add_common(grid)
    for name, text in (
        ("status", "the state of each job"),
        ("logs", "what a job printed"),
        ("cancel", "end what runs or waits"),
        ("resume", "submit again what did not succeed; trainings go on from their checkpoints"),
    ):
        added = commands.add_parser(name, help=text)
        added.add_argument("out", type=Path, metavar="DIR", help="the --out of a pipeline or sweep")
        if name == "logs":
            added.add_argument(
                "job", nargs="?", help="name of a step (default: the last that printed something)"
            )
            added.add_argument("--rank", type=int, default=0)
            added.add_argument("--lines", type=int, default=20, help="of the end (default: 20; 0: all)")
        if name == "resume":
            added.add_argument("--no-wait", action="store_true", help="leave once all is submitted")
            _add_resources(added, None)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of all runs (default: runs/COMMAND-RECIPE)"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="data set; with --build, where it is made")
    parser.add_argument("--build", default="", metavar="ARGUMENTS",
                        help="arguments of d2s.shard build, in one string, to make the data set first")  # fmt: skip
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="override a field; repeat"
    )
    parser.add_argument(
        "--cluster", choices=("slurm", "local"), help="default: slurm where sbatch is, else local"
    )
    _add_resources(parser, Resources(cpus=4))
    parser.add_argument(
        "--dry-run", action="store_true", help="print the scripts and commands, submit nothing"
    )
    parser.add_argument("--no-wait", action="store_true", help="on slurm: leave once all is submitted")


NUMBERS = {
    "nodes": "nodes of a training job",
    "tasks": "tasks a node, one a GPU",
    "cpus": "cores a task",
    "minutes": "time limit of a job",
    "signal_seconds": "write a checkpoint and requeue so many seconds before the limit",
}


def _add_resources(parser: argparse.ArgumentParser, defaults: Resources | None) -> None:
    """Options for what a job gets; without `defaults` what it got before."""
    for name, text in NUMBERS.items():
        default = getattr(defaults, name) if defaults else None
        shown = f"{text} ({default if defaults else 'as before'})"
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, metavar="N", help=shown)
    parser.add_argument("--no-gpus", action="store_true", help="ask for no GPUs")


def changed(held: Resources, arguments: argparse.Namespace) -> Resources:
    """What the jobs get, with what the options change of it. Raises ValueError for numbers that cannot be."""
    given = {name: getattr(arguments, name) for name in NUMBERS if getattr(arguments, name) is not None}
    for name, number in given.items():
        if number < 1:
            raise ValueError(f"--{name.replace('_', '-')} {number}: must be 1 or more")
    wanted = dataclasses.replace(held, **given, gpus=held.gpus and not arguments.no_gpus)
    if wanted.signal_seconds >= 60 * wanted.minutes:
        raise ValueError(
            f"--signal-seconds {wanted.signal_seconds}: as long as the whole job of {wanted.minutes} minutes"
        )
    if wanted.cluster == "local" and wanted.nodes > 1:
        raise ValueError(f"--nodes {wanted.nodes}: there is one machine with --cluster local")
    if wanted.cluster == "local" and wanted.gpus:
        shown = torch.cuda.device_count()
        if 0 < shown < wanted.tasks:
            raise ValueError(
                f"--tasks {wanted.tasks}: this machine shows {shown} GPUs; one task each, or --no-gpus"
            )
    return wanted


def resources(arguments: argparse.Namespace) -> Resources:
    """What new jobs get. Raises ValueError for what cannot be here."""
    cluster = arguments.cluster or ("slurm" if shutil.which("sbatch") else "local")
    if cluster == "slurm" and not (shutil.which("sbatch") and shutil.which("srun")):
        raise ValueError("--cluster slurm: there is no sbatch here; use a login node, or --cluster local")
    if cluster == "slurm" and not Path("launchers/job.sh").is_file():
        raise ValueError(f"{Path.cwd()} holds no launchers/job.sh: call this in the project's folder")
    return changed(Resources(cluster=cluster), arguments)


def tree(jobs: Jobs) -> str:
    """The jobs with their numbers and states, each below what it waits for."""
    lines = [f"{jobs.folder}  ({jobs.resources.cluster})"]
    for depth, step in enumerate(jobs.steps):
        branch = "   " * depth + "`- "
        number = f"  {_number(step)}" if step.ids else ""
        many = f" x {len(step.commands)}" if len(step.commands) > 1 else ""
        lines.append(f"{branch}{step.name}{many}{number}  {' '.join(step.commands[0])}")
    return "\n".join(lines)


def _number(step: Step) -> str:
    return f"job {step.ids[0].split('_')[0]}"


def _new(arguments: argparse.Namespace) -> None:
    out = arguments.out or Path("runs") / f"{arguments.command}-{arguments.recipe}"
    if any(out.glob("*")) and not arguments.dry_run:
        raise ValueError(f"--out {out}: is not empty; choose another, or `resume {out}` to go on with it")
    wanted = resources(arguments)
    build = shlex.split(arguments.build)
    points = None
    if arguments.command == "pipeline":
        found = source(arguments.recipe, arguments.data, build, out, wanted.cpus)
        steps = pipeline(arguments.recipe, found, out, arguments.set)
    else:
        # A run to start from knows its data.
        inherit = arguments.init is not None and arguments.data is None and not build
        found = None if inherit else source(arguments.recipe, arguments.data, build, out, wanted.cpus)
        steps, points = sweep(arguments.recipe, found, arguments.init, out, arguments.grid, arguments.set)
    if arguments.dry_run:
        print("\n".join(dump(out, step, wanted) for step in steps))
        return
    jobs = Jobs(out, wanted, steps)
    if points is not None:
        # Before anything can fail: `resume` prints the table, too.
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / POINTS, points)
    jobs.submit()
    _go(jobs, wait=not arguments.no_wait)


def _go(jobs: Jobs, *, wait: bool) -> None:
    """Prints the tree, sees the jobs through, and prints what they found."""
    print(tree(jobs), flush=True)
    local = jobs.resources.cluster == "local"
    if local:
        jobs.work(lambda text: print(text, flush=True))
    if not (wait or local):
        return
    good = jobs.watch(lambda text: print(text, flush=True))
    if (jobs.folder / POINTS).is_file():
        print(sweep_table(read_json(jobs.folder / POINTS), jobs.folder))
    elif good:
        _print_evaluation(jobs)
    if not good:
        # What waited for a failed job is cancelled, or never was submitted: not worth a word.
        failed = [
            step for step in jobs.steps if set(jobs.states(step)) - {"COMPLETED", "PENDING", "CANCELLED"}
        ]
        for step in failed:
            _print_errors(jobs, step)
        names = ", ".join(step.name for step in failed)
        raise ValueError(
            f"{names} did not succeed; `logs {jobs.folder} NAME` tells more, `resume {jobs.folder}` goes on"
        )


def _print_evaluation(jobs: Jobs) -> None:
    """The evaluation's own table, as its job printed it."""
    step = jobs.steps[-1]
    for path in logs_of(jobs.folder, step.ids[-1]):
        if path.suffix == ".out":
            text = path.read_text(encoding="utf-8")
            print("\n".join(line for line in text.splitlines() if not line.startswith("submitit ")))


def _print_errors(jobs: Jobs, step: Step) -> None:
    """Where a step's jobs wrote, and their own words for what went wrong, without tracebacks."""
    for number in step.ids:
        for path in logs_of(jobs.folder, number):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            said = [line for line in lines if is_last_word(line)]
            print("\n".join([f"==> {path}", *said[-3:]]))


def is_last_word(line: str) -> bool:
    """Whether a line says what went wrong: of a command, or the end of a traceback, and not of srun about a rank."""
    # Our own exception around a command only points to such lines.
    foreign = line.startswith(("srun:", "slurm")) or line.endswith("see the lines above")
    return not foreign and re.search(r"error(:|$)", line, re.IGNORECASE) is not None


def _print_logs(jobs: Jobs, step: Step, rank: int, lines: int) -> None:
    for number in step.ids:
        for path in logs_of(jobs.folder, number, rank):
            print(f"==> {path}")
            print("\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]))


def _status(jobs: Jobs) -> None:
    for step in jobs.steps:
        states = jobs.states(step)
        numbers = step.ids if len(step.ids) == len(states) else [""] * len(states)
        for number, state in zip(numbers, states, strict=True):
            print(f"{step.name:<10} {number:<12} {state}")


def _logs(jobs: Jobs, arguments: argparse.Namespace) -> None:
    known = [step.name for step in jobs.steps]
    if arguments.job and arguments.job not in known:
        raise ValueError(f"no step {arguments.job!r}; there are {', '.join(known)}")
    started = [
        step for step in jobs.steps if any(any(logs_of(jobs.folder, n, arguments.rank)) for n in step.ids)
    ]
    chosen = [step for step in jobs.steps if step.name == arguments.job] if arguments.job else started[-1:]
    if not set(map(id, chosen)) & set(map(id, started)):
        states = ", ".join(f"{step.name} is {jobs.states(step)[0]}" for step in chosen or jobs.steps)
        raise ValueError(f"nothing was printed yet as rank {arguments.rank}: {states}")
    for step in chosen:
        _print_logs(jobs, step, arguments.rank, arguments.lines)


def _command(arguments: argparse.Namespace) -> None:
    if arguments.command in ("pipeline", "sweep"):
        _new(arguments)
        return
    jobs = Jobs.load(arguments.out)
    if arguments.command == "status":
        _status(jobs)
    elif arguments.command == "logs":
        _logs(jobs, arguments)
    elif arguments.command == "cancel":
        jobs.cancel()
        _status(jobs)
    elif jobs.again():
        jobs.resources = changed(jobs.resources, arguments)
        jobs.submit()
        _go(jobs, wait=not arguments.no_wait)
    else:
        print(f"{arguments.out}: every job has succeeded")


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Returns its exit code: 0, or 2 after one line of what is wrong."""
    arguments = _parser().parse_args(argv)
    return run(lambda: _command(arguments))


if __name__ == "__main__":
    sys.exit(main())
