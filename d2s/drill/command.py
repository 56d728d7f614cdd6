"""Kills a training again and again, and compares what comes out with a training left in peace.

`python -m d2s.drill --workers 2 --kills 20 --seed 0` starts a real training with two workers, kills one of them or
all with SIGKILL (after a step, while a checkpoint is being written, while it starts), starts it again with
`--resume`, until it is done; then compares every loss and the final weights with an uninterrupted run's. The
moments follow from the seed. `--workers 2,1,4` goes on with another number of workers after each kill.
"""

import argparse
import math
import shlex
import shutil
import sys
import tempfile
import time
from math import lcm
from pathlib import Path

from d2s.common import command
from d2s.drill.compare import TOLERANCE, Comparison, compare, recorded_steps
from d2s.drill.run import Drill, DrillError, draw_kills, reference

# The smallest training that has all parts: a step takes some ten milliseconds, an epoch thirty steps.
_SMALL = {
    "--model.width": "16", "--data.image_size": "32", "--model.image_size": "32",
    "--data.loader_workers": "0", "--optim.warmup_steps": "0",
}  # fmt: skip
# At a rate at which this model learns, AdamW makes rounding errors grow until two runs that nobody has killed are as
# far apart as those to compare. At this one rounding errors stay what they are.
_CALM = {"--optim.lr": "1e-5", "--optim.backbone_lr": "1e-5"}
_SCENES = "build --source scenes --count train={train},val=8,test=8 --size 32 --out {out}"


def verdict(comparison: Comparison, *, fixed: bool, tolerance: float) -> tuple[str, bool]:
    """The line that closes a drill, and whether it is a yes."""
    if fixed:
        good = comparison.bit_equal
        return f"bit-equal: {'yes' if good else 'no'}", good
    good = comparison.within(tolerance)
    return (
        f"largest difference {comparison.loss:.1e} of a loss (step {comparison.loss_step}), "
        f"{comparison.weights:.1e} of the weights, within tolerance {tolerance:.0e}: {'yes' if good else 'no'}"
    ), good


def training_arguments(options: argparse.Namespace, overrides: list[str], data: Path) -> list[str]:
    """What train.py is given, but --run."""
    batch = lcm(*options.workers)
    fields = {"--batch_size": str(batch * -(-8 // batch)), **_SMALL} if _is_small(options) else {}
    fields |= {
        "--max_steps": str(options.steps), "--log.every": "1", "--checkpoint.every_steps": str(options.save_steps),
        "--checkpoint.max_stalled_restarts": "0",  # a kill while saving or at a start is no sign of a stalled run
    }  # fmt: skip
    if len(set(options.workers)) > 1:
        fields["--model.text_dropout"] = "0"  # its draws are the worker's, not the sample's
        if _is_small(options):
            fields |= _CALM
    given = {argument.split("=", 1)[0] for argument in overrides}
    arguments = [word for name, value in fields.items() if name not in given for word in (name, value)]
    return [options.recipe, "--data", str(data), *arguments, *overrides]


def _is_small(options: argparse.Namespace) -> bool:
    return options.recipe.startswith("scenes_small") and options.data is None


def make_data(out: Path, batch: int) -> Path:
    """Small made-up scenes, thirty batches of them."""
    from d2s.shards.cli import main as shard

    folder = out / "data"
    if shard(_SCENES.format(train=30 * batch, out=folder).split()):
        raise DrillError(f"the scenes could not be built in {folder}")
    return folder


def perform(options: argparse.Namespace, overrides: list[str], out: Path) -> bool:
    """The whole drill below `out`; prints the verdict and returns it."""
    started = time.monotonic()
    batch = lcm(*options.workers)
    data = options.data or make_data(out, batch * -(-8 // batch))
    arguments = training_arguments(options, overrides, data)
    logs, against, seconds = out / "logs", options.against, 10.0
    if against is None:
        against = out / "reference"
        seconds = reference(arguments, against, logs, options.workers[0], options.launcher, options.patience)
        print(f"uninterrupted       {options.steps} steps with {options.workers[0]} workers", flush=True)
    drill = Drill(
        arguments=arguments,
        run=out / "drilled",
        logs=logs,
        workers=options.workers,
        kills=draw_kills(options.kills, options.seed),
        last=options.steps - options.save_steps - 2,
        launcher=options.launcher,
        grace=options.grace,
        patience=options.patience,
        start_seconds=seconds,
    )
    drill.go()
    comparison = compare(drill.run, against)
    lines = [
        f"workers             {','.join(map(str, options.workers))}",
        *drill.tally.lines(options.kills, drill.run),
    ]
    print("\n".join([*lines, *comparison.lines()]))
    print(f"took                {time.monotonic() - started:.0f} s in all")
    survived = len(drill.tally.kills) == options.kills
    if not survived:
        print("fewer kills than asked for: the training ended before them; give it more --steps")
    line, good = verdict(comparison, fixed=len(set(options.workers)) == 1, tolerance=options.tolerance)
    print(line, flush=True)
    return good and survived and not drill.tally.hung


def worker_counts(text: str) -> tuple[int, ...]:
    """`2` or `2,1,4`."""
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
    add(
        "--workers",
        type=worker_counts,
        default=(2,),
        metavar="N[,N...]",
        help="of each start in turn (default: 2)",
    )
    add("--kills", type=int, default=5, metavar="N", help="how often (default: 5)")
    add("--seed", type=int, default=0, help="of the moments and the victims (default: 0)")
    add("--recipe", default="scenes_small_pretrain", help="what is trained (default: the smallest)")
    add("--data", type=Path, metavar="DIR", help="data set (default: small scenes, built for the drill)")
    add(
        "--steps",
        type=int,
        metavar="N",
        help="optimization steps (default: 20, and 10 for each kill)",
    )
    add("--save-steps", type=int, default=5, metavar="N", help="between two checkpoints (default: 5)")
    add(
        "--out", type=Path, metavar="DIR", help="empty or new folder for all of it (default: a temporary one)"
    )
    add("--keep", action="store_true", help="keep the temporary folder; it is kept anyway after a no")
    add(
        "--against",
        type=Path,
        metavar="RUN",
        help="finished, uninterrupted run to compare with (default: trains one)",
    )
    add("--tolerance", type=float, default=TOLERANCE, help="where the number of workers changes, relative"
        f" (default: {TOLERANCE:g})")  # fmt: skip
    add("--launcher", default="", metavar="COMMAND", help="starts the workers, {workers} standing for their number:"
        " 'torchrun --standalone --nproc_per_node {workers}' (default: they are started by the drill)")  # fmt: skip
    add("--grace", type=float, default=60.0, metavar="S", help="seconds for survivors to end (default: 60)")
    add(
        "--patience",
        type=float,
        default=900.0,
        metavar="S",
        help="seconds without any progress (default: 900)",
    )
    add("--attach", action="store_true", help="only kill workers of the running job that trains into --run, on this"
        " machine, and leave its restarts to its own launcher; then compare with --against")  # fmt: skip
    add("--run", type=Path, metavar="RUN", help="with --attach: the job's run folder")
    add("--spread", type=float, default=60.0, metavar="S", help="with --attach: mean seconds from progress to a kill"
        " (default: 60)")  # fmt: skip
    add("--compare", type=Path, nargs=2, metavar="RUN", help="only compare two finished runs")
    return parser


def check(options: argparse.Namespace, overrides: list[str]) -> None:
    """Raises ValueError for what does not go together, before any long work."""
    from d2s.training.arguments import parse
    from d2s.training.config import override
    from d2s.training.recipes import find_recipe

    _check_numbers(options)
    if options.steps is None:
        options.steps = 20 + 10 * options.kills
    _, fields = parse(training_arguments(options, overrides, Path()))
    config = override(find_recipe(options.recipe), fields)
    if config.max_steps != options.steps:
        raise ValueError(
            f"--max_steps {config.max_steps}: the drill sets it; give --steps {config.max_steps} instead"
        )
    least = 2 * options.kills + options.save_steps + 2
    if options.steps < least:
        raise ValueError(
            f"--steps {options.steps} is too short for {options.kills} kills: give at least {least}"
        )
    _check_folders(options)
    _check_start(options, config.batch_size)
    if options.against:
        _check_against(options, config.log.every)


def _check_numbers(options: argparse.Namespace) -> None:
    for name, least in (("kills", 0), ("seed", 0), ("steps", 1), ("save_steps", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value}: give {least} or more")
    for name in ("grace", "patience", "spread", "tolerance"):
        value = getattr(options, name)
        if not 0 <= value < math.inf:
            raise ValueError(f"--{name} {value:g}: give a finite number, 0 or more")


def _check_folders(options: argparse.Namespace) -> None:
    from d2s.shards.read.stream import is_pattern

    if options.out and options.out.exists():
        if not options.out.is_dir():
            raise ValueError(f"--out {options.out} is no folder: choose another name")
        if any(options.out.iterdir()):
            raise ValueError(f"--out {options.out} is not empty: choose another folder")
    if options.attach != (options.run is not None):
        raise ValueError("--attach and --run go together: the run folder of the job to drill")
    data = options.data
    if data and not is_pattern(str(data)) and not data.is_dir():
        raise ValueError(f"--data {data} is no folder: name one made by `python -m d2s.shard build`")


def _check_start(options: argparse.Namespace, batch_size: int) -> None:
    """That the workers can be started, all the numbers of them."""
    from d2s.workers.group import local_batch

    try:
        shlex.split(options.launcher)
    except ValueError as error:
        raise ValueError(f"--launcher {options.launcher!r}: {error}; quote it as for a shell") from error
    for workers in () if options.attach else options.workers:
        local_batch(batch_size, workers)


def _check_against(options: argparse.Namespace, every: int) -> None:
    """What to compare with has to be there before the first kill, not only after the last."""
    run = options.against
    try:
        found = recorded_steps(run)
    except ValueError as error:
        raise ValueError(f"--against: {error}, or leave it out to train one") from error
    if options.attach:
        return  # how many steps that job takes is its own matter
    steps = options.steps
    wanted = {step for step in range(1, steps + 1) if step % every == 0 or step == steps}
    if max(found) != steps:
        remedy = f"give --steps {max(found)}"
    elif found != wanted:
        remedy = f"train it with --log.every {every}"
    else:
        return
    raise ValueError(
        f"--against {run} has rows of {len(found)} steps up to step {max(found)}, where this drill has {len(wanted)} "
        f"up to step {steps}: {remedy}, or leave it out to train one"
    )


def work(options: argparse.Namespace, overrides: list[str]) -> bool:
    """What was asked for; whether the verdict is a yes."""
    if options.compare:
        comparison = compare(*options.compare)
        print("\n".join(comparison.lines()))
        print(verdict(comparison, fixed=False, tolerance=options.tolerance)[0])
        print(verdict(comparison, fixed=True, tolerance=0)[0])
        return comparison.bit_equal or comparison.within(options.tolerance)
    check(options, overrides)
    if options.attach:
        from d2s.drill.attach import attach

        return attach(options)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        return perform(options, overrides, options.out)
    out = Path(tempfile.mkdtemp(prefix="d2s-drill-"))
    good = False
    try:
        good = perform(options, overrides, out)
    finally:
        if good and not options.keep:
            shutil.rmtree(out)
        else:
            print(f"kept                {out}")
    return good


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 for a yes, 1 for a no or a training that failed, 2 for a user's mistake."""
    options, overrides = parser().parse_known_args(argv)
    results: list[bool] = []
    try:
        code = command.run(lambda: results.append(work(options, overrides)))
    except DrillError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return code or int(not results[0])
