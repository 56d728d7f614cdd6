"""Trains one stage: `deepspeed d2s/train.py RECIPE --data DIR --run DIR [--init RUN] [--field value ...]`.

The same file runs under deepspeed, torchrun, srun and plain python. Everything that can be wrong with the
arguments, the configuration or the data is said in one line before any long work starts.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

# Script mode puts this folder first on the path, where its modules could shadow others.
if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from d2s.checkpoint.restarts import StalledError, forget_start
from d2s.workers.preemption import PREEMPTED, Preempted, Preemption

if TYPE_CHECKING:
    from d2s.training.trainer import Trainer

_AFTER_WORKER_0 = 5.0
EPILOG = """\
Any field of the configuration can be overridden by its dotted name, as in --optim.lr 1e-4 --batch_size 256;
`RECIPE --help` lists all of them with their meaning. Examples:
  deepspeed d2s/train.py scenes_small_pretrain --data data/scenes --run runs/scenes-pretrain
  deepspeed d2s/train.py scenes_small_finetune --init runs/scenes-pretrain --run runs/scenes-finetune
"""


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Splits the command line into the run's own options and the overrides of the configuration."""
    from d2s.training.recipes import RECIPES

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


def main(arguments: list[str] | None = None, preemption: Preemption | None = None) -> int:
    """Runs the command and returns its exit code.

    0: done; 1: it could not go on; 2: a user's mistake; 75: preempted, to be run again with --resume; 130: Ctrl-C.

    preemption: notes the signals; none are taken where there is none.
    """
    preemption = preemption or Preemption()
    if _rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        options, overrides = parse(sys.argv[1:] if arguments is None else arguments)
        from d2s.training.prepare import plan

        prepared = plan(options, overrides)
        if options.dry_run:
            from d2s.plan.dry_run import describe

            print(describe(prepared))
            return 0
        trainer = prepared.start(preemption)
    except KeyboardInterrupt:
        return _fail("interrupted before the first step", 130, preemption)
    except (ValueError, OSError) as error:
        return _fail(error, 2, preemption)
    except StalledError as error:
        return _fail(error, 1, preemption)
    except Preempted as asked:
        print(f"{asked} before the first step; --resume goes on", flush=True)
        return PREEMPTED
    try:
        with trainer:
            return _train(trainer)
    except (ValueError, FloatingPointError) as error:
        return _fail(error, 1, preemption)
    except OSError as error:
        return _fail(ValueError(f"{error}: make room or mend it, then --resume"), 1, preemption)
    except KeyboardInterrupt:
        forget_start(trainer.run)
        return _fail("interrupted; --resume goes on from the newest checkpoint", 130, preemption)


def _train(trainer: "Trainer") -> int:
    try:
        trainer.train()
    except Preempted as asked:
        if trainer.workers.is_main:
            trainer.log.say(f"{asked} at step {trainer.step}: its checkpoint is complete; --resume goes on")
        return PREEMPTED
    if trainer.workers.is_main:
        trainer.log.say(trainer.summary())
    return 0


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _fail(error: object, code: int, preemption: Preemption) -> int:
    """One line on stderr. Worker 0 speaks first: what all have run into is said once."""
    preemption.uninstall()
    _hold()
    if _rank():
        time.sleep(_AFTER_WORKER_0)
    worker = f" (worker {_rank()})" if _rank() else ""
    print(f"train.py: error{worker}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    if isinstance(error, Exception):
        _tell_launcher(error)
    return code


def _tell_launcher(error: BaseException) -> None:
    """torchrun closes with a table of its own, which shows what it finds in this file."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ and "torch" in sys.modules:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def _hold() -> None:
    """Ends the process where the failure is only what another worker's end brought about."""
    if "torch" in sys.modules:
        from d2s.workers.group import exit_if_another_failed

        exit_if_another_failed()


class _LastWords:
    """Ends the process after an error that nothing has caught, without waiting for anything.

    The interpreter's own way out would tear down threads and connections, which may hang or abort.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or "torch" not in sys.modules:
            return
        _hold()
        if isinstance(error, SystemExit):  # --help, or a library that gives up: the other workers must notice
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(error.code if isinstance(error.code, int) else int(error.code is not None))
        sys.excepthook(kind, error, trace)  # torch's puts the worker's number before each line
        _tell_launcher(error)
        _leave(1)


def _leave(code: int) -> None:
    if "torch" in sys.modules:
        from d2s.workers.group import leave

        leave(code, ordered=code in (0, PREEMPTED))


def run() -> NoReturn:
    """The script: takes the signals before any heavy import, and leaves so that every other worker knows how."""
    preemption = Preemption()
    preemption.install()
    with _LastWords():
        code = main(preemption=preemption)
        _leave(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
