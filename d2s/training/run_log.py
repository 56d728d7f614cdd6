"""What a run says: metrics.jsonl (the source of truth), TensorBoard, W&B if asked for, and the screen.

Only the first worker writes. On a terminal one line is redrawn; elsewhere plain lines appear, so that a batch
system's log stays readable.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from d2s.common.files import atomic_file
from d2s.common.progress import clock


class RunLog:
    """Appends rows to `run`/metrics.jsonl and mirrors their numbers to TensorBoard and, if asked, W&B.

    is_main: on all other workers every call does nothing. resume_step: rows after this step are dropped first,
    since a resumed run will write them again.
    """

    def __init__(
        self,
        run: Path,
        *,
        is_main: bool,
        resume_step: int,
        total_steps: int,
        wandb_project: str = "",
    ) -> None:
        self._is_main = is_main
        self._line = ProgressLine(total_steps)
        if not is_main:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._path = run / "metrics.jsonl"
        _drop_after(self._path, resume_step)
        # Without a buffer: what a full disk did not take would be tried again, and fail again, at the end.
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=resume_step)
        self._wandb = _start_wandb(wandb_project, run) if wandb_project else None

    def row(self, kind: str, step: int, values: dict[str, object]) -> None:
        """Writes one row: {"kind", "step", ...values}; numbers (also in lists) go to TensorBoard.

        Raises ValueError in one line where the disk does not take it.
        """
        if not self._is_main:
            return
        rest = memoryview((json.dumps({"kind": kind, "step": step, **values}) + "\n").encode())
        with self._one_line(self._path):
            while rest:
                rest = rest[self._file.write(rest) :]
        with self._one_line(self._board.log_dir):
            self._mirror(kind, step, values)

    @staticmethod
    @contextmanager
    def _one_line(path: object) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            why = error.strerror or error
            raise ValueError(
                f"{path} could not be written ({why}): make room or mend it, then --resume"
            ) from error

    def _mirror(self, kind: str, step: int, values: dict[str, object]) -> None:
        scalars = {
            f"{kind}/{name}": value for name, value in values.items() if isinstance(value, int | float)
        }
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(scalars, step=step)

    def progress(self, step: int, values: dict[str, float]) -> None:
        if self._is_main:
            self._line.show(step, values)

    def say(self, text: str) -> None:
        """Prints a line of its own, above the progress line; all workers may speak, all but the first on stderr."""
        self._line.clear()
        print(text, file=sys.stdout if self._is_main else sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._line.clear()
        if not self._is_main:
            return
        self._file.close()
        # It writes what is left; of a disk that is full the error on the way says it already.
        with suppress(OSError, ValueError) if kind else nullcontext(), self._one_line(self._board.log_dir):
            self._board.close()
        if self._wandb:
            self._wandb.finish(exit_code=int(kind is not None))


class ProgressLine:
    """Loss, learning rate, samples/s and time left, from the rate since this process started."""

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps
        self._terminal = sys.stdout.isatty()
        self._start: tuple[int, float] | None = None
        self._drawn = False

    def show(self, step: int, values: dict[str, float]) -> None:
        now = time.monotonic()
        if self._start is None:
            self._start = (step, now)
        steps, seconds = step - self._start[0], now - self._start[1]
        left = f"{clock(seconds / steps * (self._total - step))} left" if steps else "measuring the rate"
        text = (
            f"step {step}/{self._total}  epoch {values['epoch']:.2f}  loss {values['loss']:.3f}  "
            f"lr {values['lr']:.2e}  {values['samples_per_s']:.0f} samples/s  {left}"
        )
        if self._terminal:
            print(f"\r\x1b[2K{text}", end="", flush=True)
            self._drawn = True
        else:
            print(text, flush=True)

    def clear(self) -> None:
        if self._drawn:
            print("\r\x1b[2K", end="", flush=True)
            self._drawn = False


def read_rows(run: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl; a last line cut off by a kill is left out."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _drop_after(path: Path, step: int) -> None:
    kept = [row for row in read_rows(path.parent) if row["step"] <= step]
    with atomic_file(path) as file:
        file.writelines(json.dumps(row).encode() + b"\n" for row in kept)


def _start_wandb(project: str, run: Path) -> object:
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            "log.wandb is set but wandb is not installed: pip install wandb, or unset it"
        ) from error
    return wandb.init(project=project, name=run.name, dir=str(run))
