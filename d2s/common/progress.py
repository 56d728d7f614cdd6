"""Shows the progress of a long job, as a bar on a terminal, or else as a line of text every few seconds."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

_SECONDS_BETWEEN_LINES = 5.0

T = TypeVar("T")


def clock(seconds: float) -> str:
    """Formats a time as h:mm:ss, or as m:ss if it is less than an hour. Rounds seconds down."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def track(items: Iterable[tuple[int, T]], label: str, total: int, unit: str = "images") -> Iterator[T]:
    """Yields the item of each pair (count, item). Shows on stderr how many of `total` are done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    terminal = sys.stderr.isatty()
    start = shown = time.monotonic()
    done = 0
    with Progress(*columns, console=Console(stderr=True), disable=not terminal) as bar:
        task = bar.add_task(label, total=total, rate="")
        for count, item in items:
            yield item
            done += count
            now = time.monotonic()
            rate = f"{done / max(now - start, 1e-9):,.0f} {unit}/s"
            bar.update(task, completed=done, rate=rate)
            if not terminal and now - shown >= _SECONDS_BETWEEN_LINES and done < total:
                shown = now
                left = clock((now - start) * (total - done) / max(done, 1))
                print(f"{label}: {done:,} of {total:,}, {rate}, {left} left", file=sys.stderr, flush=True)
    seconds = time.monotonic() - start
    summary = f"{label}: {done:,} {unit} in {clock(seconds)} ({done / max(seconds, 1e-9):,.0f}/s)"
    print(summary, file=sys.stderr, flush=True)
