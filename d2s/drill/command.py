"""Kills a training again and again, and compares the result with an uninterrupted training.

`python -m d2s.drill --workers 2 --kills 20 --seed 0` starts a real training with two workers. The drill kills one
worker or all workers with SIGKILL (after a training step, while a checkpoint is being written, or at a start). It
restarts the training with `--resume`, and repeats this until the training is done. Then it compares every loss and
the final weights with an uninterrupted run. The seed determines the moments of the kills. `--workers 2,1,4` changes
the number of workers at each restart.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

from d2s.common import command
from d2s.common.command import user_path
from d2s.drill.compare import TOLERANCE, compare
from d2s.drill.kills import DrillError


def run_drill(options: argparse.Namespace, overrides: list[str], out: Path) -> bool:
    """Runs the drill in `out`, with `overrides` for train.py. Prints the report. Returns whether it passed."""
    from d2s.drill.kill_loop import KillLoop, train_reference
    from d2s.drill.options import small_batch, training_arguments
    from d2s.shards.cli import build_scenes

    started = time.monotonic()
    count = f"train={30 * small_batch(options)},val=8,test=8"
    data = options.data or build_scenes(out / "data", count, size=32)
    arguments = training_arguments(options, overrides, data)
    logs, against, seconds = out / "logs", options.against, 10.0
    if against is None:
        against = out / "reference"
        seconds = train_reference(arguments, against, logs, options)
        print(f"uninterrupted       {options.steps} steps with {options.workers[0]} workers", flush=True)
    loop = KillLoop(
        arguments=arguments, run=out / "drilled", logs=logs, options=options, start_seconds=seconds
    )
    loop.go()
    comparison = compare(loop.run, against)
    print(f"workers             {','.join(map(str, options.workers))}")
    print("\n".join([*loop.tally.lines(options.kills, loop.run), *comparison.lines()]))
    print(f"took                {time.monotonic() - started:.0f} s in all")
    survived = len(loop.tally.kills) == options.kills
    if not survived:
        print("fewer kills than asked for: the training ended before them; give it more --steps")
    line, passed = comparison.verdict(fixed=len(set(options.workers)) == 1, tolerance=options.tolerance)
    print(line, flush=True)
    return passed and survived and not loop.tally.hung


def worker_counts(text: str) -> tuple[int, ...]:
    """Parses one or several numbers of workers, such as `2` or `2,1,4`. Raises ArgumentTypeError for other text."""
    parts = text.split(",")
    if not all(part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of workers (2), nor several (2,1,4)")
    return tuple(map(int, parts))


def parser() -> command.Parser:
    parser = command.Parser(
        prog="python -m d2s.drill",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Further arguments are train.py's: --optim.lr 1e-4 --engine.zero_stage 2 --init RUN.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--workers", type=worker_counts, default=(2,), metavar="N[,N...]",
        help="of each start in turn (default: 2)")  # fmt: skip
    add("--kills", type=int, default=5, metavar="N", help="number of kills (default: 5)")
    add("--seed", type=int, default=0, help="of the moments and the victims (default: 0)")
    add("--recipe", default="scenes_small_pretrain", help="recipe to train (default: the smallest)")
    add("--data", type=user_path, metavar="DIR", help="data set (default: small scenes, built for the drill)")
    add("--steps", type=int, metavar="N", help="optimization steps (default: 20, and 10 for each kill)")
    add("--save-steps", type=int, default=5, metavar="N", help="steps between two checkpoints (default: 5)")
    add(
        "--out",
        type=user_path,
        metavar="DIR",
        help="empty or new folder for all files (default: a temporary one)",
    )
    add("--keep", action="store_true", help="keep the temporary folder; it is kept anyway after a no")
    add("--against", type=user_path, metavar="RUN",
        help="finished, uninterrupted run to compare with (default: trains one)")  # fmt: skip
    add("--tolerance", type=float, default=TOLERANCE,
        help=f"relative, for a changing number of workers (default: {TOLERANCE:g})")  # fmt: skip
    add("--launcher", default="", metavar="COMMAND", help="starts the workers, with {workers} for their number:"
        " 'torchrun --standalone --nproc_per_node {workers}' (default: the drill starts them)")  # fmt: skip
    add("--grace", type=float, default=60.0, metavar="S", help="seconds for survivors to end (default: 60)")
    add("--patience", type=float, default=900.0, metavar="S",
        help="seconds without any progress before the drill gives up (default: 900)")  # fmt: skip
    add("--attach", action="store_true", help="only kill workers of the running job that trains into --run, on this"
        " machine, and leave its restarts to its own launcher; then compare with --against")  # fmt: skip
    add("--run", type=user_path, metavar="RUN", help="with --attach: the job's run folder")
    add("--spread", type=float, default=60.0, metavar="S",
        help="with --attach: mean seconds from progress to a kill (default: 60)")  # fmt: skip
    add("--compare", type=user_path, nargs=2, metavar="RUN", help="only compare two finished runs")
    return parser


def _run(options: argparse.Namespace, overrides: list[str]) -> bool:
    """Compares two runs, attaches to a job, or runs a drill, as the options say. Returns whether the check passed."""
    if options.compare:
        comparison = compare(*options.compare)
        print("\n".join(comparison.lines()))
        print(comparison.verdict(fixed=False, tolerance=options.tolerance)[0])
        print(comparison.verdict(fixed=True, tolerance=0)[0])
        return comparison.bit_equal or comparison.within(options.tolerance)
    from d2s.drill.options import check

    check(options, overrides)
    if options.attach:
        from d2s.drill.attach import attach

        return attach(options)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        return run_drill(options, overrides, options.out)
    out = Path(tempfile.mkdtemp(prefix="d2s-drill-"))
    passed = False
    try:
        passed = run_drill(options, overrides, out)
    finally:
        if passed and not options.keep:
            shutil.rmtree(out)
        else:
            print(f"kept                {out}")
    return passed


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns 0 if the drill passed, 1 if it or a training failed, 2 for a user's mistake."""
    options, overrides = parser().parse_known_args(argv)
    return command.run(lambda: int(not _run(options, overrides)), failure=DrillError)
