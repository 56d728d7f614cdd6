"""Writes the metrics of a run to metrics.jsonl, TensorBoard, Weights & Biases (W&B) if wanted, and the screen.

Other code reads only metrics.jsonl. Only the first worker writes. A terminal shows one progress line that is redrawn.
Elsewhere, as in a log file, each update is a new line.
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
    """Appends rows to metrics.jsonl in the folder `run`, and copies the numbers to TensorBoard and W&B.
    is_main: True on the first worker. On other workers `row` and `progress` do nothing. resume_step: rows after this
    training step are deleted, because the resumed run writes them again. total_steps: number of training steps of
    the whole run. wandb_project: name of the W&B project; empty for none."""

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
        self._total_steps = total_steps
        self._first_shown: tuple[int, float] | None = None
        self._line_drawn = False
        if not is_main:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._path = run / "metrics.jsonl"
        _drop_after(self._path, resume_step)
        # Unbuffered, because after a failed write on a full disk a buffer would fail again when it is closed.
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=resume_step)
        self._wandb = None
        if wandb_project:
            import wandb

            self._wandb = wandb.init(project=wandb_project, name=run.name, dir=str(run))

    def row(self, kind: str, step: int, values: dict[str, object]) -> None:
        """Writes the row {"kind": kind, "step": step, **values}. The numbers also go to TensorBoard and W&B.

        Raises ValueError, in one line, if the disk is full or broken.
        """
        if not self._is_main:
            return
        unwritten = memoryview((json.dumps({"kind": kind, "step": step, **values}) + "\n").encode())
        with _one_line(self._path):
            while unwritten:
                unwritten = unwritten[self._file.write(unwritten) :]
        numbers = {f"{kind}/{name}": v for name, v in values.items() if isinstance(v, int | float)}
        with _one_line(self._board.log_dir):
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(numbers, step=step)

    def progress(self, step: int, values: dict[str, float]) -> None:
        """Shows a row's numbers and the time left. Estimates the time from the mean speed since the first call."""
        if not self._is_main:
            return
        now = time.monotonic()
        first_step, first_time = self._first_shown = self._first_shown or (step, now)
        left = "measuring the rate"
        if step > first_step:
            left = f"{clock((now - first_time) / (step - first_step) * (self._total_steps - step))} left"
        text = (
            f"step {step}/{self._total_steps}  epoch {values['epoch']:.2f}  loss {values['loss']:.3f}  "
            f"lr {values['lr']:.2e}  {values['samples_per_s']:.0f} samples/s  {left}"
        )
        self._line_drawn = sys.stdout.isatty()
        start, end = ("\r\x1b[2K", "") if self._line_drawn else ("", "\n")
        print(start + text, end=end, flush=True)

    def say(self, text: str) -> None:
        """Prints a line, and removes the progress line. The first worker prints on stdout, the others on stderr."""
        self._clear_line()
        print(text, file=sys.stdout if self._is_main else sys.stderr, flush=True)

    def _clear_line(self) -> None:
        if self._line_drawn:
            print("\r\x1b[2K", end="", flush=True)
            self._line_drawn = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clear_line()
        if not self._is_main:
            return
        self._file.close()
        # Closing writes buffered data. After an error, such as a full disk, a second error would hide the first.
        with suppress(OSError, ValueError) if kind else nullcontext(), _one_line(self._board.log_dir):
            self._board.close()
        if self._wandb:
            self._wandb.finish(exit_code=int(kind is not None))


@contextmanager
def _one_line(path: object) -> Iterator[None]:
    """Turns an OSError in the `with` block into a ValueError that names `path` and a remedy."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise ValueError(
            f"{path} could not be written ({why}): make room or mend it, then --resume"
        ) from error


def read_rows(run: Path) -> list[dict]:
    """Returns the rows of metrics.jsonl in the folder `run`. Ignores an incomplete last line of a killed process."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _drop_after(path: Path, step: int) -> None:
    rows = [row for row in read_rows(path.parent) if row["step"] <= step]
    with atomic_file(path) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
