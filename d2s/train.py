"""Trains one stage: `deepspeed d2s/train.py RECIPE --data DIR --run DIR [--init RUN] [--field value ...]`.

The same file runs under deepspeed, torchrun, srun and plain python. It reports a mistake in the arguments, the
configuration or the data in one line, before training starts.
"""

import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

# Python puts a script's folder first on sys.path, where modules of d2s could hide others: use the parent folder.
if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from d2s.checkpoint.restarts import StalledError, forget_start
from d2s.common.messages import one_line
from d2s.workers.preemption import PREEMPTED, Preempted, Preemption, leave_group

if TYPE_CHECKING:
    from d2s.training.trainer import Trainer

SECONDS_AFTER_WORKER_0 = 5.0
"""Seconds that the other workers wait before they report an error. Worker 0 probably reports the same error."""


def main(arguments: list[str] | None = None, preemption: Preemption | None = None) -> int:
    """Runs the command and returns its exit code.
    0: done; 1: training failed; 2: a user's mistake; 75: preempted, run again with --resume; 130: Ctrl-C.
    arguments: the command line; by default sys.argv. preemption: an object whose signal handlers are installed. By
    default stop signals are not handled."""
    preemption = preemption or Preemption()
    if _rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        from d2s.training.arguments import parse

        options, overrides = parse(sys.argv[1:] if arguments is None else arguments)
        from d2s.training.checks import check_arguments

        spec = check_arguments(options, overrides)
        if options.dry_run:
            from d2s.plan.dry_run import describe

            print(describe(spec))
            return 0
        from d2s.training.build import build_trainer

        trainer = build_trainer(spec, preemption)
    except KeyboardInterrupt:
        return _report_error("interrupted before the first step", 130, preemption)
    except (ValueError, OSError) as error:
        return _report_error(error, 2, preemption)
    except StalledError as error:
        return _report_error(error, 1, preemption)
    except Preempted as signal:
        print(f"{signal} before the first step; --resume goes on", flush=True)
        return PREEMPTED
    try:
        with trainer:
            return _train(trainer)
    except (ValueError, FloatingPointError) as error:
        return _report_error(error, 1, preemption)
    except OSError as error:
        return _report_error(ValueError(f"{error}: make room or mend it, then --resume"), 1, preemption)
    except KeyboardInterrupt:
        forget_start(trainer.run)
        return _report_error("interrupted; --resume goes on from the newest checkpoint", 130, preemption)


def _train(trainer: "Trainer") -> int:
    try:
        trainer.train()
    except Preempted as signal:
        if trainer.workers.is_main:
            step = trainer.state.step
            trainer.log.say(f"{signal} at step {step}: its checkpoint is complete; --resume goes on")
        return PREEMPTED
    if trainer.workers.is_main:
        trainer.log.say(trainer.summary())
    return 0


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _report_error(error: object, code: int, preemption: Preemption) -> int:
    """Prints the error as one line on stderr and returns `code`.
    All workers often fail for the same reason. So workers other than worker 0 wait, so that worker 0 can report the
    error and end them."""
    preemption.uninstall()
    _exit_if_another_failed()
    if _rank():
        time.sleep(SECONDS_AFTER_WORKER_0)
    worker = f" (worker {_rank()})" if _rank() else ""
    print(f"train.py: error{worker}: {one_line(str(error))}", file=sys.stderr, flush=True)
    if isinstance(error, Exception):
        _record_for_torchrun(error)
    return code


def _record_for_torchrun(error: BaseException) -> None:
    """Stores the error in a file for torchrun, which shows it in its table of failed workers. Else does nothing."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ and "torch" in sys.modules:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def _exit_if_another_failed() -> None:
    """Ends this process silently if another worker failed first, because the error here is only a consequence."""
    if "torch" in sys.modules:
        from d2s.workers.group import exit_if_another_failed

        exit_if_another_failed()


def _exit_on_uncaught(
    kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
) -> None:
    """Ends the process at once after an uncaught error. An ExitStack calls this function.

    The interpreter's normal exit may hang or abort while it closes threads and connections.
    """
    if kind is None or "torch" not in sys.modules:
        return
    _exit_if_another_failed()
    if isinstance(error, SystemExit):  # from --help or a library; the other workers must notice the exit
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.code if isinstance(error.code, int) else int(error.code is not None))
    sys.excepthook(kind, error, trace)  # torch's hook adds the worker's number to each line
    _record_for_torchrun(error)
    leave_group(1, ordered=False)


def run() -> NoReturn:
    """Runs this script: installs the signal handlers before any slow import, trains, and ends the process."""
    preemption = Preemption()
    preemption.install()
    with ExitStack() as stack:
        stack.push(_exit_on_uncaught)
        code = main(preemption=preemption)
        leave_group(code, ordered=code in (0, PREEMPTED))
    sys.exit(code)


if __name__ == "__main__":
    run()
