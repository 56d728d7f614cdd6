"""Processes that load batches: results in order, one-line errors, and an end of their own."""

import atexit
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch.utils.data import DataLoader, Dataset

from d2s.workers.preemption import SIGNALS

_PROCESSES: WeakSet[BaseProcess] = WeakSet()


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How samples become batches. The data set's folder, the split, the batch and the seed are given apart."""

    image_size: int = 224
    """Side of the square input in pixels."""
    sparse: Literal["all", "one"] = "all"
    """An epoch is all (image, sparse caption) pairs, or each image once with one caption drawn."""
    dense: Literal["whole", "sentences"] = "whole"
    """A dense caption is used whole, or as a random subset of its sentences in their order (training only)."""
    max_words_sparse: int = 64
    """Positions of a sparse caption at most, special tokens included; a longer one is cut and counted."""
    max_words_dense: int = 256
    """Positions of a dense caption at most."""
    crop_min: float = 0.6
    """Smallest side ratio of a random crop; 1 switches cropping off."""
    flip: float = 0.5
    """Probability of a left-right flip."""
    word_augment: float = 0.2
    """Probability that a word is masked, replaced or deleted; 0 switches it off."""
    order: Literal["rows", "blocks"] = "rows"
    """Samples in a random order over the whole split, or mixed within blocks of shards, for slow random reads."""
    block_shards: int = 8
    """Shards in a block, where order is "blocks"."""
    loader_workers: int = 2
    """Worker processes of each rank that load; 0 loads in the training process. Batches do not depend on it."""
    damage_budget: int = 100
    """Damaged samples, each counted once, that a run replaces before it stops."""

    def __post_init__(self) -> None:
        choices = {"sparse": ("all", "one"), "dense": ("whole", "sentences"), "order": ("rows", "blocks")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: use {allowed[0]!r} or {allowed[1]!r}")
        lowest = {
            "image_size": 1,
            "max_words_sparse": 4,
            "max_words_dense": 4,
            "block_shards": 1,
            "loader_workers": 0,
            "damage_budget": 0,
        }
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: use at least {least}")
        if not 0 < self.crop_min <= 1:
            raise ValueError(f"crop_min is {self.crop_min}: use a ratio above 0 and at most 1")
        for name in ("flip", "word_augment"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: use a probability from 0 to 1")


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
