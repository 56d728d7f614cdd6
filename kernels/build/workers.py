"""Processes in which kernels are built, without TRITON_INTERPRET."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

from d2s.kernels.build.builds import Built, Job, build


def _compiling_process() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


class Workers:
    """Processes that build. A compiler that takes its process with it is the fault of its job alone."""

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._pool = _pool(processes)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def build(self, todo: Sequence[Job]) -> Iterator[Built]:
        """The jobs' results in their order, built side by side."""
        futures = [self._submit(job) for job in todo]
        done = 0
        for future in futures:
            if isinstance(future.exception(), BrokenProcessPool):
                break
            yield future.result()
            done += 1
        else:
            return
        # Who ended its process is not known, and all that waited are lost: each gets a process of its own.
        self._pool.shutdown(cancel_futures=True)
        self._pool = _pool(self.processes)
        with ThreadPoolExecutor(self.processes) as threads:
            yield from threads.map(_alone, todo[done:])

    def _submit(self, job: Job) -> Future:
        try:
            return self._pool.submit(build, job)
        except BrokenProcessPool as error:
            refused: Future = Future()
            refused.set_exception(error)
            return refused


def _pool(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, get_context("spawn"), _compiling_process)


def _alone(job: Job) -> Built:
    with _pool(1) as pool:
        try:
            return pool.submit(build, job).result()
        except BrokenProcessPool:
            return Built(job=job, figures=None, error="the compiler ended its process")
