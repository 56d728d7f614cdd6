"""Collectives without gradient: every worker calls them together, and each gets the same result.

Without a process group, or with a single worker, each returns at once. Rows that carry a gradient are exchanged by
:mod:`d2s.workers.exchange`.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from d2s.workers.group import several_workers, world_size

T = TypeVar("T")


def barrier() -> None:
    """Waits until every worker is here."""
    if several_workers():
        dist.barrier()


def all_gather(rows: Tensor) -> Tensor:
    """All workers' rows in rank order: (B, ...) -> (W * B, ...), with the same B on each."""
    if not several_workers():
        return rows
    out = rows.new_empty(world_size() * rows.shape[0], *rows.shape[1:])
    dist.all_gather(list(out.chunk(world_size())), rows.contiguous())
    return out


def all_gather_objects(value: T) -> list[T]:
    """Every worker's `value`, which is pickled, in rank order."""
    if not several_workers():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def sum_over_workers(value: Tensor) -> Tensor:
    """The sum of `value` over all workers, as a new tensor."""
    total = value.detach().clone()
    if several_workers():
        dist.all_reduce(total)
    return total


def max_over_workers(value: int) -> int:
    """The largest `value` of any worker."""
    if not several_workers():
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    largest = torch.tensor([value], dtype=torch.int64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest.item())


def run_on_all(action: Callable[[], T]) -> list[T]:
    """Runs `action` on every worker and returns all results in rank order.

    Raises ValueError on every worker, naming the first one at fault, if `action` raises OSError on any of them: a
    disk can fail on one worker alone, and the others would wait for it. Other exceptions are bugs and pass through.
    """
    result, failure = None, ""
    try:
        result = action()
    except OSError as error:
        failure = ": ".join(str(part) for part in (error.strerror or error, error.filename) if part)
    outcomes = all_gather_objects((result, failure))
    for rank, (_, failure) in enumerate(outcomes):
        if failure:
            raise ValueError(f"worker {rank}: {failure}")
    return [result for result, _ in outcomes]
