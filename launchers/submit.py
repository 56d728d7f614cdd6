"""`python -m d2s.launchers.submit pipeline | sweep | status | logs | cancel | resume`: runs jobs through submitit.

A pipeline builds shards, pre-trains, fine-tunes and evaluates, in jobs that run one after the other. A sweep trains
one recipe for each combination of the values in a grid. `--cluster slurm` submits all jobs at once. `--cluster local`
runs the jobs on this machine. A training that is preempted or reaches its time limit writes a checkpoint. It is then
requeued and resumes from the checkpoint.
"""

import argparse
import dataclasses
import shlex
import shutil
import sys
from pathlib import Path

from d2s.common.command import Parser, positive, run, user_path
from d2s.common.files import read_json, write_json
from d2s.launchers import show
from d2s.launchers.executors import Resources, preview
from d2s.launchers.jobs import Jobs

POINTS = "grid.json"
EXAMPLES = """\
examples:
  python -m d2s.launchers.submit pipeline f30k_vitb16_384 --data data/f30k --out runs/f30k --nodes 2 --tasks 8
  python -m d2s.launchers.submit pipeline --cluster local --out runs/scenes
  python -m d2s.launchers.submit sweep f30k_vitb16_384_finetune --data data/f30k --init runs/f30k/pretrain \\
      --grid optim.lr=1e-4,2e-4 --grid loss.distill_weight=0,64 --out runs/sweep
  python -m d2s.launchers.submit status runs/sweep
"""
NUMBERS = {
    "nodes": "nodes of a training job",
    "tasks": "tasks per node, one for each GPU",
    "cpus": "cores per task",
    "minutes": "time limit of a job",
    "signal_seconds": "write a checkpoint and requeue this many seconds before the limit",
}


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m d2s.launchers.submit",
        description="Chains of jobs, on a SLURM cluster or on this machine.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = commands.add_parser("pipeline", help="shards, pre-training, fine-tuning, evaluation").add_argument
    add("recipe", nargs="?", default="scenes_small", metavar="RECIPE",
        help="common prefix of the two recipes (default: scenes_small)")  # fmt: skip
    add = commands.add_parser("sweep", help="one recipe over a grid of settings, as a job array").add_argument
    add("recipe", metavar="RECIPE")
    add("--grid", action="append", default=[], metavar="FIELD=V1,V2", help="values of a field; repeat")
    add("--init", type=user_path, metavar="DIR", help="stage-1 run to start from; by default one is trained")
    for name in ("pipeline", "sweep"):
        _add_common(commands.choices[name])
    for name, text in (
        ("status", "the state of each job"),
        ("logs", "what a job printed"),
        ("cancel", "end all jobs that run or wait"),
        ("resume", "submit again what did not succeed; trainings go on from their checkpoints"),
    ):
        commands.add_parser(name, help=text).add_argument(
            "out", type=user_path, metavar="DIR", help="the --out of a pipeline or sweep"
        )
    add = commands.choices["logs"].add_argument
    add("job", nargs="?", help="name of a step (default: the last that printed something)")
    add("--rank", type=int, default=0)
    add("--lines", type=int, default=20, help="number of last lines (default: 20; 0: all)")
    _add_resources(commands.choices["resume"], None)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    """Adds the options that are common to the commands pipeline and sweep."""
    add = parser.add_argument
    add("--out", type=user_path, metavar="DIR", help="folder of all runs (default: runs/COMMAND-RECIPE)")
    add("--data", type=user_path, metavar="DIR", help="data set; with --build, the folder to build it in")
    add("--build", default="", metavar="ARGUMENTS",
        help="arguments of d2s.shard build, in one string, to build the data set first")  # fmt: skip
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="override a field; repeat")
    add("--cluster", choices=("slurm", "local"), help="default: slurm if there is sbatch, else local")
    add("--dry-run", action="store_true", help="print the scripts and commands, submit nothing")
    _add_resources(parser, Resources(cpus=4))


def _add_resources(parser: argparse.ArgumentParser, defaults: Resources | None) -> None:
    """Adds the options for resources. If `defaults` is None, a resource without an option stays as it was."""
    for name, text in NUMBERS.items():
        default = getattr(defaults, name) if defaults else None
        shown = f"{text} ({default if defaults else 'as before'})"
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=positive, default=default, metavar="N", help=shown)
    parser.add_argument("--no-gpus", action="store_true", help="ask for no GPUs")
    parser.add_argument("--no-wait", action="store_true", help="on slurm: return once all is submitted")


def apply_options(resources: Resources, arguments: argparse.Namespace) -> Resources:
    """Returns `resources`, changed by the options in `arguments`. Raises ValueError for impossible resources."""
    given = {name: getattr(arguments, name) for name in NUMBERS if getattr(arguments, name) is not None}
    wanted = dataclasses.replace(resources, **given, gpus=resources.gpus and not arguments.no_gpus)
    if wanted.signal_seconds >= 60 * wanted.minutes:
        raise ValueError(
            f"--signal-seconds {wanted.signal_seconds}: as long as the whole job of {wanted.minutes} minutes"
        )
    if wanted.cluster == "local" and wanted.nodes > 1:
        raise ValueError(f"--nodes {wanted.nodes}: there is one machine with --cluster local")
    if wanted.cluster == "local" and wanted.gpus:
        import torch  # slow, and not needed on SLURM

        visible = torch.cuda.device_count()
        if 0 < visible < wanted.tasks:
            raise ValueError(
                f"--tasks {wanted.tasks}: this machine shows {visible} GPUs; one task each, or --no-gpus"
            )
    return wanted


def new_resources(arguments: argparse.Namespace) -> Resources:
    """Returns the resources for the jobs of a new pipeline or sweep. Raises ValueError for impossible resources."""
    cluster = arguments.cluster or ("slurm" if shutil.which("sbatch") else "local")
    if cluster == "slurm" and not (shutil.which("sbatch") and shutil.which("srun")):
        raise ValueError("--cluster slurm: there is no sbatch here; use a login node, or --cluster local")
    if cluster == "slurm" and not Path("launchers/job.sh").is_file():
        raise ValueError(f"{Path.cwd()} holds no launchers/job.sh: call this in the project's folder")
    return apply_options(Resources(cluster=cluster), arguments)


def _start(arguments: argparse.Namespace) -> None:
    """Starts a pipeline or sweep and follows its jobs. With --dry-run, only prints the scripts and commands."""
    # Imported here, because the recipes import torch, which takes seconds.
    from d2s.launchers.pipeline import as_options, find_data, grid_points, pipeline, sweep

    out = arguments.out or Path("runs") / f"{arguments.command}-{arguments.recipe}"
    if any(out.glob("*")) and not arguments.dry_run:
        raise ValueError(f"--out {out}: is not empty; choose another, or `resume {out}` to go on with it")
    resources = new_resources(arguments)
    recipe, options, build = arguments.recipe, as_options(arguments.set), shlex.split(arguments.build)
    # A sweep that starts from a run (--init) uses the data of that run by default.
    inherit = arguments.command == "sweep" and arguments.init and not arguments.data and not build
    data, steps = (None, []) if inherit else find_data(recipe, arguments.data, build, out, resources.cpus)
    points = None
    if arguments.command == "pipeline":
        steps = pipeline(recipe, data, steps, out, options)
    else:
        points = grid_points(arguments.grid)
        steps = sweep(recipe, data, steps, arguments.init, out, points, options)
    if arguments.dry_run:
        print("\n".join(preview(out, step, resources) for step in steps))
        return
    if points is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / POINTS, points)  # first, because submitting may fail; `resume` reads it
    jobs = Jobs(out, resources, steps)
    jobs.submit()
    _follow(jobs, wait=not arguments.no_wait)


def _follow(jobs: Jobs, *, wait: bool) -> None:
    """Prints the steps, runs the local jobs or waits for SLURM's jobs, and prints the results.

    wait: whether to wait for SLURM's jobs. If a job failed, prints its errors and raises ValueError.
    """
    show.print_tree(jobs)
    if jobs.local:
        jobs.run_locally()
    elif not wait:
        return
    succeeded = jobs.wait()
    if (jobs.folder / POINTS).is_file():
        show.print_sweep(read_json(jobs.folder / POINTS), jobs.folder)
    elif succeeded:
        show.print_evaluation(jobs)
    if not succeeded:
        # Steps after a failed step are cancelled or still pending. They have no errors to print.
        harmless = {"COMPLETED", "PENDING", "CANCELLED"}
        failed = [step for step in jobs.steps if set(jobs.states(step)) - harmless]
        for step in failed:
            show.print_errors(jobs, step)
        names = ", ".join(step.name for step in failed)
        raise ValueError(
            f"{names} did not succeed; `logs {jobs.folder} NAME` tells more, `resume {jobs.folder}` goes on"
        )


def _execute(arguments: argparse.Namespace) -> None:
    if arguments.command in ("pipeline", "sweep"):
        _start(arguments)
        return
    jobs = Jobs.load(arguments.out)
    if arguments.command == "resume":
        if not jobs.reset_unsuccessful():
            print(f"{arguments.out}: every job has succeeded")
            return
        jobs.resources = apply_options(jobs.resources, arguments)
        jobs.submit()
        _follow(jobs, wait=not arguments.no_wait)
    elif arguments.command == "logs":
        show.print_logs(jobs, arguments.job, arguments.rank, arguments.lines)
    else:
        if arguments.command == "cancel":
            jobs.cancel()
        show.print_states(jobs)


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns 0, or prints a user's mistake in one line and returns 2."""
    arguments = _parser().parse_args(argv)
    return run(lambda: _execute(arguments))


if __name__ == "__main__":
    sys.exit(main())
