"""Plans a training: `python -m d2s.plan RECIPE --gpus 4 --memory 80 [--throughput 900] [--field value ...]`.

Prints for each ZeRO stage how much memory each part takes on a worker, how many bytes a worker sends in a training
step, and the largest batch that fits. Then prints the time of an epoch. Needs neither a GPU nor data, because the
model is built with random weights on the CPU. `--check` trains a few real steps on this machine and prints measured
figures beside the planned figures.
"""

import argparse
import tempfile
from pathlib import Path

from d2s.common import command
from d2s.common.command import positive, user_path


def parser() -> command.Parser:
    parser = command.Parser(
        prog="python -m d2s.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Further arguments are the configuration's: --batch_size 4096 --engine.micro_batch 64.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="as of train.py")
    add("--gpus", type=positive, default=1, metavar="N", help="workers (default: 1)")
    add("--memory", type=float, default=80.0, metavar="GB", help="of each, in GiB (default: 80)")
    add("--throughput", type=float, metavar="PAIRS_PER_S", help="measured or hoped for, over all GPUs")
    add("--data", type=user_path, metavar="DIR", help="data set (default: the usual size of the recipe's)")
    add("--check", action="store_true", help="train a few steps here and compare; scenes without --data")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns 0, or 2 after one line that names the user's mistake."""
    options, overrides = parser().parse_known_args(argv)
    return command.run(lambda: _plan(options, overrides))


def _plan(options: argparse.Namespace, overrides: list[str]) -> None:
    from d2s.plan.request import read_request
    from d2s.plan.tables import compare, describe

    request, throughput = read_request(options, overrides), options.throughput
    if options.check:
        from d2s.plan.measure import STEPS, measure
        from d2s.shards.cli import build_scenes

        with tempfile.TemporaryDirectory(prefix="d2s-plan-") as folder:
            count, size = 8 * request.config.batch_size, request.config.data.image_size
            data = options.data or build_scenes(Path(folder) / "data", f"train={count},val=8", size)
            measured = measure([options.recipe, "--data", str(data), *overrides], request.workers)
        print(compare(request, measured, STEPS))
        throughput = throughput or measured["samples_per_s"]
    print(describe(request, throughput))
