"""Trains one stage: `deepspeed d2s/train.py RECIPE --data DIR --run DIR [--init RUN] [--field value ...]`.

The same file runs under deepspeed, torchrun, srun and plain python. Everything that can be wrong with the
arguments, the configuration or the data is said in one line before any long work starts.
"""

import argparse
import os
import sys
import time
from pathlib import Path

# Script mode puts this folder first on the path, where its modules could shadow others.
if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_AFTER_WORKER_0 = 5.0
EPILOG = """\
Any field of the configuration can be overridden by its dotted name, as in --optim.lr 1e-4 --batch_size 256;
`RECIPE --help` lists all of them with their meaning. Examples:
  deepspeed d2s/train.py scenes_small_pretrain --data data/scenes --run runs/scenes-pretrain
  deepspeed d2s/train.py scenes_small_finetune --init runs/scenes-pretrain --run runs/scenes-finetune
"""


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Splits the command line into the run's own options and the overrides of the configuration."""
    from d2s.recipes import RECIPES

    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train one stage of D2S-VSE.",
        epilog=EPILOG + "\nrecipes:\n" + "".join(f"  {name}\n" for name in RECIPES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a named configuration, listed below")
    parser.add_argument("--data", metavar="DIR", help="data set made by `python -m d2s.shard build`, or a URL"
                        " pattern of tars; by default that of --init or of the resumed run")  # fmt: skip
    parser.add_argument("--val-data", metavar="DIR", help="data set to validate on, where --data is a stream")
    parser.add_argument(
        "--run", metavar="DIR", type=Path, help="folder of the run; everything is written there"
    )
    parser.add_argument("--init", metavar="DIR", type=Path, help="stage-1 run or model folder to start from")
    parser.add_argument("--resume", action="store_true", help="go on from the run's newest complete checkpoint,"
                        " or start where there is none")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print configuration, parameters, steps and memory,"
                        " and leave")  # fmt: skip
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument(
        "-h", "--help", action="store_true", help="show this help; after RECIPE, all its fields"
    )
    options, overrides = parser.parse_known_args(arguments)
    if options.recipe is None:
        if options.help:
            parser.print_help()
            raise SystemExit(0)
        raise ValueError("no recipe given: name one of those that --help lists")
    if options.help:
        overrides.append("--help")
    return options, overrides


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0 done, 1 it could not go on, 2 a user's mistake, 130 Ctrl-C."""
    if _rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        options, overrides = parse(sys.argv[1:] if arguments is None else arguments)
        from d2s.prepare import plan

        prepared = plan(options, overrides)
        if options.dry_run:
            from d2s.dry_run import describe

            print(describe(prepared))
            return 0
        trainer = prepared.start()
    except (ValueError, OSError) as error:
        return _fail(error, 2)
    try:
        with trainer.log:
            trainer.train()
            trainer.log.say(trainer.summary())
    except (ValueError, FloatingPointError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted; --resume goes on from the newest checkpoint", 130)
    return 0


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _fail(error: object, code: int) -> int:
    """One line on stderr. Worker 0 speaks first: a launcher ends all workers as soon as one has left."""
    if _rank():
        time.sleep(_AFTER_WORKER_0)
    worker = f" (worker {_rank()})" if _rank() else ""
    print(f"train.py: error{worker}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    code = main()
    if "torch" in sys.modules:
        from d2s.distributed import leave

        leave(code)
    sys.exit(code)
