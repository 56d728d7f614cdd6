"""The processes of a DataLoader, which hear no signal that asks a job to stop, and so need an end of their own."""

import atexit
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from typing import Any
from weakref import WeakSet

from torch.utils.data import DataLoader

_PROCESSES: WeakSet[BaseProcess] = WeakSet()


def results_of(loader: DataLoader) -> Iterator[Any]:
    """iter(loader) of a loader made with `spare_loader`: its processes end with this one at the latest.

    An iterator that is let go stops them. One that is still held at the exit leaves them to Python, which sends TERM,
    that they do not hear, and waits for ever.
    """
    results = iter(loader)
    _PROCESSES.update(getattr(results, "_workers", ()))
    # What was registered last is called first: before torch's own goodbye, which waits seconds for each process.
    atexit.unregister(_end)
    atexit.register(_end)
    return results


def _end() -> None:
    for process in _PROCESSES:
        if process.is_alive():
            process.kill()
