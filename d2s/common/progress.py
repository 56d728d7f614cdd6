"""How far a long job is: a bar on a terminal, a plain line every five seconds elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Self

_EVERY = 5.0


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Counts towards `total` and shows rate and time left on stderr."""

    def __init__(self, label: str, total: int, unit: str = "images") -> None:
        self._label, self._total, self._unit = label, total, unit
        self._done = 0
        self._start = self._shown = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
            )
            self._bar = Bar(TextColumn("{task.description}"), *columns, console=Console(stderr=True))
            self._task = self._bar.add_task(label, total=total, rate="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._bar:
            self._bar.stop()
        if kind is None:
            elapsed = time.monotonic() - self._start
            rate = self._done / max(elapsed, 1e-9)
            text = f"{self._label}: {self._done:,} {self._unit} in {clock(elapsed)} ({rate:,.0f}/s)"
            print(text, file=sys.stderr, flush=True)

    def advance(self, count: int) -> None:
        """Adds `count` to what is done."""
        self._done += count
        now = time.monotonic()
        rate = self._done / max(now - self._start, 1e-9)
        if self._bar:
            self._bar.update(self._task, completed=self._done, rate=f"{rate:,.0f} {self._unit}/s")
        elif now - self._shown >= _EVERY and self._done < self._total:
            self._shown = now
            left = clock((self._total - self._done) / max(rate, 1e-9))
            text = (
                f"{self._label}: {self._done:,} of {self._total:,} {self._unit}, {rate:,.0f}/s, {left} left"
            )
            print(text, file=sys.stderr, flush=True)


def track(items: Iterable[tuple[int, object]], progress: Progress) -> Iterator[object]:
    """Yields the second of each (count, item) and advances by the first."""
    with progress:
        for count, item in items:
            progress.advance(count)
            yield item
