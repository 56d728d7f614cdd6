"""Defines collectives without gradient. All workers call a function together. All get the same result.

With a single worker, or without a process group, nothing is exchanged. Collectives with gradient are in
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
    """Waits until every worker has called this function."""
    if several_workers():
        dist.barrier()


def all_gather(rows: Tensor) -> Tensor:
    """Returns the rows of all W workers in rank order, of shape (W * B, ...). rows: shape (B, ...), the same B on all
    workers."""
    if not several_workers():
        return rows
    out = rows.new_empty(world_size() * rows.shape[0], *rows.shape[1:])
    dist.all_gather(list(out.chunk(world_size())), rows.contiguous())
    return out


def all_gather_objects(value: T) -> list[T]:
    """Returns the `value` of every worker, in rank order. The value must be picklable."""
    if not several_workers():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def sum_over_workers(value: Tensor) -> Tensor:
    """Returns the sum of `value` over all workers, as a new tensor."""
    total = value.detach().clone()
    if several_workers():
        dist.all_reduce(total)
    return total


def max_over_workers(value: int) -> int:
    """Returns the largest `value` of all workers."""
    if not several_workers():
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    largest = torch.tensor([value], dtype=torch.int64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest.item())


def run_on_all(action: Callable[[], T]) -> list[T]:
    """Runs `action` on every worker and returns all results in rank order.
    If `action` raises OSError on any worker, every worker raises a ValueError that names the first failed rank.
    (If only the failed worker raised an error, the others would wait for it forever.) Other exceptions are bugs and
    are not caught."""
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
