"""Runs one function over many tasks in several processes, with the same result for any number of them."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any


def _begin(initializer: Callable[..., None], arguments: tuple) -> None:
    # Ctrl-C goes to the whole group; the parent decides what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    initializer(*arguments)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for tasks for ever: both ends of the queue are its own."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def map_ordered(
    function: Callable[[Any], Any],
    tasks: Sequence[Any],
    workers: int,
    initializer: Callable[..., None],
    arguments: tuple,
) -> Iterator[tuple[Any, Any]]:
    """Yields (task, result) in the order of the tasks. `initializer(*arguments)` prepares each process.

    With one worker everything happens in this process. Processes are spawned, not forked: threads of numpy
    and pyarrow do not survive a fork. Only a few tasks wait at a time, so that millions of them need no memory.

    Raises:
        ValueError: raised by the function, as it is (that of the first task in order); or a process died.
    """
    if workers <= 1 or len(tasks) <= 1:
        initializer(*arguments)
        for task in tasks:
            yield task, function(task)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, _begin, (initializer, arguments))
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
