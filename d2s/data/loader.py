"""Loads batches in processes. Yields the results in order, reports an error in one line, and ends the processes."""

import atexit
import signal
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import Any
from weakref import WeakSet

import torch
from torch.utils.data import DataLoader, Dataset

from d2s.workers.preemption import SIGNALS

_PROCESSES: WeakSet[BaseProcess] = WeakSet()


class StepLoader:
    """Computes `dataset[item]` for a list of items in several processes, and yields the results in the list's order.

    An item describes a whole batch, so batches do not depend on the number of processes, which live through all runs.
    """

    def __init__(self, dataset: Dataset, processes: int) -> None:
        self._dataset, self._processes = _ErrorsAsResults(dataset), processes
        self._items: list[Any] = []
        self._loader: DataLoader | None = None

    def run(self, items: Sequence[Any]) -> Iterator[Any]:
        """Yields dataset[item] for each item. A later call of `run` ends the iterator of the earlier one.

        If dataset[item] raises a ValueError, stops the processes and raises it here.
        """
        if not items:
            return
        if self._loader is None:
            self._loader = new_loader(
                self._dataset, self._processes, sampler=self._items, persistent_workers=self._processes > 0
            )
        self._items[:] = items
        try:
            yield from results_of(self._loader)
        except ValueError:
            self._loader = None  # the last reference to the processes, which stop now
            raise


def new_loader(dataset: Dataset, processes: int, **settings: Any) -> DataLoader:
    """Returns a DataLoader for a dataset that returns whole batches. Its processes ignore stop signals."""
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=processes,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_ignore_stop_signals,
        **settings,
    )


def _ignore_stop_signals(process: int) -> None:
    """Makes a loader process ignore stop signals, which may go to all processes: the worker still needs batches."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def results_of(loader: DataLoader) -> Iterator[Any]:
    """Yields the results of `loader`. If a result is a ValueError, raises it. Kills the processes at exit.

    The processes return a ValueError instead of raising it, because torch would add two tracebacks to its message.
    """
    results = iter(loader)
    # At exit Python would send TERM to the processes, which ignore it, and wait for them forever: kill them first.
    # The exit handler is registered last, to run before torch's handler, which waits seconds for each process.
    _PROCESSES.update(getattr(results, "_workers", ()))
    atexit.unregister(_kill_processes)
    atexit.register(_kill_processes)
    for result in results:
        if isinstance(result, ValueError):
            try:
                raise result
            finally:
                # The error's traceback keeps this frame's variables alive: drop those that keep the processes alive.
                del result, results, loader
        yield result


def _kill_processes() -> None:
    for process in _PROCESSES:
        if process.is_alive():
            process.kill()


class _ErrorsAsResults(Dataset):
    """Wraps a dataset: returns a ValueError as the result instead of raising it. See :func:`results_of`."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, item: Any) -> Any:
        try:
            return self.dataset[item]
        except ValueError as error:
            return error
