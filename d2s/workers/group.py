"""Workers: who this process is, how workers exchange rows, and how a process leaves in order.

The same file runs under `deepspeed`, `torchrun`, `srun` and plain `python`: only the environment differs.
How gradients travel is in :mod:`d2s.workers.exchange`.
"""

import os
import re
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

from d2s.common.ports import free_port
from d2s.workers.watchdog import Watch, start_watch

_watch: Watch | None = None
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Workers:
    """This process among its fellows: `rank` of `world`, and `local_rank` on its machine."""

    rank: int
    world: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start_workers() -> Workers:
    """Joins the process group that the launcher describes, or makes one of a single process.

    D2S_TIMEOUT: minutes for which an exchange waits for a worker that is alive but silent.

    Raises ValueError where a launcher set only some of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and, on every
    worker, where two share a GPU or only some have one.
    """
    global _watch
    timeout = waiting_time()
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if len(missing) == len(names):
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    elif missing:
        raise ValueError(
            f"the launcher set some of {', '.join(names)} but not {', '.join(missing)}: "
            "use deepspeed, torchrun or srun, or set all four"
        )
    if os.environ["WORLD_SIZE"] == "1":
        # Launchers offer one fixed port, at which a second run on the machine would fail.
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", cuda_index(local_rank)) if cuda else torch.device("cpu")
    if cuda and device.index >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} finds {torch.cuda.device_count()} GPUs: start as many workers as a machine has"
        )
    if cuda:
        os.environ["LOCAL_RANK"] = str(device.index)  # by which DeepSpeed chooses its device
        torch.cuda.set_device(device)
        in_full_precision()
    if not cuda or "D2S_THREADS" in os.environ:
        _share_cores()
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout)
        refuse_shared_devices(_everyones_devices(device))
        _watch = start_watch(dist.get_rank(), dist.get_world_size())
    return Workers(rank=dist.get_rank(), world=dist.get_world_size(), local_rank=local_rank, device=device)


def cuda_index(local_rank: int) -> int:
    """The number of this worker's device. One that is bound to each task is number 0 to all of them."""
    return 0 if torch.cuda.device_count() == 1 else local_rank


def in_full_precision() -> None:
    """float32 stays float32 on a GPU: torch's default shortens convolutions and recurrent layers to TF32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def _everyones_devices(device: torch.device) -> list[str]:
    """What each worker computes on, by rank: "cpu", or its machine and GPU.

    Through the store, before the first collective, which would hang or fail and not say which workers are at fault.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    name = "cpu"
    if device.type == "cuda":
        name = f"{socket.gethostname()} GPU {torch.cuda.get_device_properties(device).uuid}"
    store, keys = _get_default_store(), [f"d2s/device/{k}" for k in range(world)]
    store.set(keys[rank], name)
    store.wait(keys)
    return [value.decode() for value in store.multi_get(keys)]


def refuse_shared_devices(devices: list[str]) -> None:
    """Raises ValueError where two workers have one GPU, or where some have none. devices: by rank, "cpu" for none."""
    without = [rank for rank, name in enumerate(devices) if name == "cpu"]
    if without and len(without) < len(devices):
        raise ValueError(
            f"rank {without[0]} of {len(devices)} sees no GPU, and others do: mend its machine, or hide the GPUs "
            "from all workers with CUDA_VISIBLE_DEVICES=''"
        )
    first: dict[str, int] = {}
    for rank, name in enumerate(devices):
        if name != "cpu" and first.setdefault(name, rank) != rank:
            raise ValueError(
                f"ranks {first[name]} and {rank} share {name}: start as many workers as a machine has GPUs, or "
                "train on CPUs with CUDA_VISIBLE_DEVICES=''"
            )


def waiting_time() -> timedelta:
    """How long an exchange waits for a worker that is alive but silent; ValueError where D2S_TIMEOUT is no time."""
    text = os.environ.get("D2S_TIMEOUT", "30")
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float("inf"):
        raise ValueError(f"D2S_TIMEOUT is {text!r}: give minutes, above 0")
    return timedelta(minutes=minutes)


def _share_cores() -> None:
    """Launchers set one thread a process or none at all; on a CPU every worker takes its even share."""
    if "D2S_THREADS" in os.environ:
        torch.set_num_threads(_threads(os.environ["D2S_THREADS"]))
        return
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))


def _threads(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,3}", text, re.ASCII):
        raise ValueError(f"D2S_THREADS is {text!r}: give a number of threads, from 1 to 9999")
    return int(text)


def local_batch(batch_size: int, workers: int) -> int:
    """Pairs of the global batch on each worker. Raises ValueError, with the nearest batches, for a rest."""
    rest = batch_size % workers
    if rest:
        near = [str(size) for size in (batch_size - rest, batch_size - rest + workers) if size]
        raise ValueError(
            f"batch_size {batch_size} does not divide among {workers} workers: set it to {' or '.join(near)}"
        )
    return batch_size // workers


def leave(code: int, *, ordered: bool) -> NoReturn:
    """Ends this process: `ordered`, with all others, which have come this far too, or alone, as a failed one.

    A gloo thread may want the interpreter while it is being torn down and abort the process; leaving without
    the tear-down, after an ordered goodbye, avoids it.
    """
    if dist.is_initialized() and ordered:
        dist.barrier()
        dist.destroy_process_group()
    if _watch and ordered:
        _watch.farewell()
    elif _watch:
        _watch.tell(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def exit_if_another_failed() -> None:
    """Returns where this worker's failure is its own; where another one's end caused it, this process ends here."""
    if _watch:
        _watch.exit_if_another_failed()


def all_gather(rows: Tensor) -> Tensor:
    """All workers' rows in rank order, without gradient: (B, ...) -> (W * B, ...)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    world = dist.get_world_size()
    out = rows.new_empty(world * rows.shape[0], *rows.shape[1:])
    dist.all_gather(list(out.chunk(world)), rows.contiguous())
    return out


def sum_over_workers(value: Tensor) -> Tensor:
    """The sum of `value` over all workers, the same on each; no gradient. Changes nothing in place."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value.detach()
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def max_over_workers(value: int) -> int:
    """The largest `value` of any worker, the same on each."""
    if not in_group() or dist.get_world_size() == 1:
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    most = torch.tensor([value], dtype=torch.int64, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most.item())


def any_worker(flag: bool) -> bool:
    """True on every worker if it is true on any of them."""
    return bool(max_over_workers(int(flag)))


def run_on_all(action: Callable[[], T]) -> list[T]:
    """Runs `action` on every worker and returns all results in rank order, the same list on each.

    Raises ValueError, the same one on every worker, where it fails with an OSError on any: whatever one worker
    alone writes to a disk can fail there, and the others would wait for it. Other errors are bugs, and pass.
    """
    try:
        told: tuple[T | None, str] = (action(), "")
    except OSError as error:
        told = (None, ": ".join(str(part) for part in (error.strerror or error, error.filename) if part))
    everyone: list[Any] = [told]
    if in_group() and dist.get_world_size() > 1:
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, told)
    for rank, (_, failure) in enumerate(everyone):
        if failure:
            raise ValueError(f"worker {rank}: {failure}")
    return [result for result, _ in everyone]


def in_group() -> bool:
    """Whether this process has joined its fellows."""
    return dist.is_initialized()


def barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
