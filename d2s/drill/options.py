"""Checks the drill's options before any long work starts, and turns them into arguments of train.py."""

import argparse
import math
import shlex
from math import lcm
from pathlib import Path

from d2s.drill.compare import recorded_steps
from d2s.shards.read.stream import is_pattern
from d2s.training.config import override
from d2s.training.recipes import find_recipe
from d2s.workers.group import local_batch

# The smallest training that has all parts. A training step takes about 10 ms. An epoch has 30 training steps.
_SMALL = {
    "--model.width": "16", "--data.image_size": "32", "--model.image_size": "32",
    "--data.loader_workers": "0", "--optim.warmup_steps": "0",
}  # fmt: skip
# At the usual learning rate, AdamW amplifies rounding errors: even runs without kills would differ if their
# numbers of workers differ. At this learning rate, rounding errors do not grow.
_SMALL_RATE = {"--optim.lr": "1e-5", "--optim.backbone_lr": "1e-5"}


def small_batch(options: argparse.Namespace) -> int:
    """Returns the smallest batch size that is at least 8 and a multiple of every number in `options.workers`."""
    common = lcm(*options.workers)
    return common * -(-8 // common)


def training_arguments(options: argparse.Namespace, overrides: list[str], data: Path) -> list[str]:
    """Returns the arguments of train.py, without --run. The user's `overrides` replace values set here."""
    small = options.recipe.startswith("scenes_small") and options.data is None
    fields = {"--batch_size": str(small_batch(options)), **_SMALL} if small else {}
    fields |= {
        "--max_steps": str(options.steps), "--log.every": "1", "--checkpoint.every_steps": str(options.save_steps),
        "--checkpoint.max_stalled_restarts": "0",  # kills while saving or at a start must not count as stalls
    }  # fmt: skip
    if len(set(options.workers)) > 1:
        fields["--model.text_dropout"] = "0"  # dropout draws depend on the worker, not on the sample
        fields |= _SMALL_RATE if small else {}
    given = {argument.split("=", 1)[0] for argument in overrides}
    arguments = [word for name, value in fields.items() if name not in given for word in (name, value)]
    return [options.recipe, "--data", str(data), *arguments, *overrides]


def check(options: argparse.Namespace, overrides: list[str]) -> None:
    """Checks the options, and sets `options.steps` if it is None. Raises ValueError for a wrong option."""
    from d2s.training.arguments import parse

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
    try:
        shlex.split(options.launcher)
    except ValueError as error:
        raise ValueError(f"--launcher {options.launcher!r}: {error}; quote it as for a shell") from error
    for workers in () if options.attach else options.workers:
        local_batch(config.batch_size, workers)
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


def _check_against(options: argparse.Namespace, every: int) -> None:
    """Raises ValueError unless `options.against` logged the steps that this drill logs: each `every`-th step."""
    run, steps = options.against, options.steps
    try:
        found = recorded_steps(run)
    except ValueError as error:
        raise ValueError(f"--against: {error}, or leave it out to train one") from error
    if options.attach:
        return  # the job's number of steps is not known here
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
