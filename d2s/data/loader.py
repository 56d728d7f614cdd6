"""Processes that load batches: results in order, one-line errors, and an end of their own."""

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
    """Computes `dataset[item]` for a list of items in processes, and yields the results in the list's order.

    An item names a whole batch, so a batch does not depend on the number of processes, which live through all runs.
    """

    def __init__(self, dataset: Dataset, processes: int) -> None:
        self._dataset, self._processes = _ErrorsAsResults(dataset), processes
        self._items: list[Any] = []
        self._loader: DataLoader | None = None

    def run(self, items: Sequence[Any]) -> Iterator[Any]:
        """Yields dataset[item] for each item. A second run ends the first.

        Raises the ValueError that dataset[item] raised, after the processes have stopped.
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
    """A DataLoader whose dataset makes whole batches, and whose processes ignore stop signals."""
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=processes,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_ignore_stop_signals,
        **settings,
    )


def _ignore_stop_signals(process: int) -> None:
    """Lets a loader process live on when every process of a job is signalled: the worker may still need batches."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def results_of(loader: DataLoader) -> Iterator[Any]:
    """Yields a loader's results, and raises a ValueError among them. Its processes end with this one at the latest.

    A process returns its ValueError as a result, because torch would raise it with two tracebacks in the message.
    """
    results = iter(loader)
    # Python ends child processes at exit by TERM, which these ignore, and waits for them forever. Registered anew, to
    # be called before torch's own handler, which waits seconds for each process.
    _PROCESSES.update(getattr(results, "_workers", ()))
    atexit.unregister(_kill_processes)
    atexit.register(_kill_processes)
    for result in results:
        if isinstance(result, ValueError):
            try:
                raise result
            finally:
                # The error refers to this frame. If the frame referred to the processes, they would run on until the
                # error is forgotten.
                del result, results, loader
        yield result


def _kill_processes() -> None:
    for process in _PROCESSES:
        if process.is_alive():
            process.kill()


class _ErrorsAsResults(Dataset):
    """Returns ValueErrors instead of raising them, for :func:`results_of`."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, item: Any) -> Any:
        try:
            return self.dataset[item]
        except ValueError as error:
            return error
