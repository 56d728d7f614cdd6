"""Runs one function over many tasks in several processes, in order, with the same result for any number."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any


def map_unordered(
    function: Callable[[Any], Any],
    tasks: Sequence[Any],
    workers: int,
    initializer: Callable[..., None],
    arguments: tuple,
) -> Iterator[tuple[Any, Any]]:
    """Yields (task, result) as they finish. `initializer(*arguments)` prepares each process.

    With one worker everything happens in this process. Processes are spawned, not forked: threads of numpy and
    pyarrow do not survive a fork. Only a few tasks wait at a time, so that millions of shards need no memory.

    Raises:
        ValueError: raised by the function, as it is; or a process died, with what to do.
    """
    if workers <= 1 or len(tasks) <= 1:
        initializer(*arguments)
        for task in tasks:
            yield task, function(task)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, initializer, arguments)
    waiting: dict[Future, Any] = {}
    queue = iter(tasks)
    try:
        while True:
            while len(waiting) < 2 * workers and (task := next(queue, None)) is not None:
                waiting[pool.submit(function, task)] = task
            if not waiting:
                break
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                task = waiting.pop(future)
                yield task, future.result()
    except BrokenProcessPool:
        raise ValueError(
            "a worker process died (out of memory, or killed); run again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
