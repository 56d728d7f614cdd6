"""Runs a function on many tasks in several processes. Results do not depend on the number of processes."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any


def _start_worker(initializer: Callable[..., None] | None, arguments: tuple) -> None:
    # The terminal sends Ctrl-C to the parent and to all workers, but only the parent must react.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if initializer:
        initializer(*arguments)


def _end_with_parent() -> None:
    """Ends this worker process if its parent is killed. Otherwise it would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def map_ordered(
    function: Callable[[Any], Any],
    tasks: Sequence[Any],
    workers: int,
    initializer: Callable[..., None] | None = None,
    arguments: tuple = (),
) -> Iterator[tuple[Any, Any]]:
    """Calls `function` on each task. Yields pairs (task, result) in the order of the tasks.

    `workers` is the number of processes. Each process first calls `initializer(*arguments)`. If there is only
    one worker or one task, everything runs in this process. Otherwise processes are spawned, not forked,
    because threads of numpy and pyarrow do not survive a fork. To limit memory, only a few tasks are queued.
    Raises ValueError if a process dies. An error in `function` is raised in place of the task's result.
    """
    if workers <= 1 or len(tasks) <= 1:
        if initializer:
            initializer(*arguments)
        for task in tasks:
            yield task, function(task)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, _start_worker, (initializer, arguments))
    waiting: deque[tuple[Any, Future]] = deque()
    queue = iter(tasks)
    try:
        while True:
            while len(waiting) < 4 * workers and (task := next(queue, None)) is not None:
                waiting.append((task, pool.submit(function, task)))
            if not waiting:
                break
            task, future = waiting.popleft()
            yield task, future.result()
    except BrokenProcessPool:
        raise ValueError("a worker process died (killed, or out of memory); use fewer --workers") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
