"""Loads batches in loader processes. Keeps their order, reports errors in one line, and ends the processes."""

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
    An item describes a whole batch, so batches do not depend on the number of processes. The processes stay alive
    between calls of :meth:`run`."""

    def __init__(self, dataset: Dataset, processes: int) -> None:
        self._dataset, self._processes = _ErrorsAsResults(dataset), processes
        self._items: list[Any] = []
        self._loader: DataLoader | None = None

    def run(self, items: Sequence[Any]) -> Iterator[Any]:
        """Yields dataset[item] for each item. The next call of `run` ends this call's iterator.

        If dataset[item] raises a ValueError in a process, stops all processes and raises the same error.
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
            self._loader = None  # this was the last reference to the processes, so they stop
            raise


def new_loader(dataset: Dataset, processes: int, **settings: Any) -> DataLoader:
    """Returns a DataLoader for a dataset of whole batches. Its processes ignore stop signals.
    settings: other arguments of torch's DataLoader."""
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=processes,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_ignore_stop_signals,
        **settings,
    )


def _ignore_stop_signals(process: int) -> None:
    """Makes a loader process ignore stop signals. A cluster may send them to all processes, but the worker needs
    batches until it stops. process: the number of the loader process; not used."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def results_of(loader: DataLoader) -> Iterator[Any]:
    """Yields the results of `loader`. Raises a result that is a ValueError. Kills the loader processes at exit.
    A loader process returns a ValueError instead of raising it. If it raised, torch would add two tracebacks to the
    message."""
    results = iter(loader)
    # At exit Python sends TERM to the processes and waits for them. They ignore TERM, so kill them before.
    # Our exit handler is registered last, so it runs first. torch's handler would wait seconds for each process.
    _PROCESSES.update(getattr(results, "_workers", ()))
    atexit.unregister(_kill_processes)
    atexit.register(_kill_processes)
    for result in results:
        if isinstance(result, ValueError):
            try:
                raise result
            finally:
                # The error's traceback keeps this frame's variables alive. These would keep the processes alive.
                del result, results, loader
        yield result


def _kill_processes() -> None:
    for process in _PROCESSES:
        if process.is_alive():
            process.kill()


class _ErrorsAsResults(Dataset):
    """A wrapper around a dataset. If the dataset raises a ValueError, returns it as the result. See `results_of`."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, item: Any) -> Any:
        try:
            return self.dataset[item]
        except ValueError as error:
            return error
