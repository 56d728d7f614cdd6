"""This process among the workers of a run: how it joins them, which one it is, and how it leaves.

The same code runs under `deepspeed`, `torchrun`, `srun` and plain `python`: only the environment differs.
"""

import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from d2s.common.ports import free_port
from d2s.workers.devices import check_devices, choose_device, share_cores
from d2s.workers.watchdog import Watchdog, start_watchdog

_watchdog: Watchdog | None = None


@dataclass(frozen=True, kw_only=True)
class Workers:
    """This process: its `rank` among `world` workers, and its device."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is worker 0, which writes and prints for all."""
        return self.rank == 0


def in_group() -> bool:
    """Whether this process has joined a process group, be it of one worker."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Number of workers; 1 without a process group."""
    return dist.get_world_size() if in_group() else 1


def rank() -> int:
    """This worker's rank; 0 without a process group."""
    return dist.get_rank() if in_group() else 0


def several_workers() -> bool:
    """Whether there is more than one worker."""
    return world_size() > 1


def start_workers() -> Workers:
    """Joins the process group that the launcher describes, or creates one of a single process.

    Environment: D2S_TIMEOUT, the minutes that a collective waits for a worker that is alive but silent (30);
    D2S_THREADS, the CPU threads of each worker (its share of the cores).

    Raises ValueError if the launcher set only some of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and, on every
    worker, if two share a GPU or only some have one.
    """
    global _watchdog
    timeout = waiting_time()
    _complete_environment()
    device = choose_device(int(os.environ["LOCAL_RANK"]))
    if device.type == "cpu" or "D2S_THREADS" in os.environ:
        share_cores()
    if not in_group():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
        check_devices(device)
        if several_workers():
            _watchdog = start_watchdog(rank(), world_size())
    return Workers(rank=rank(), world=world_size(), device=device)


def _complete_environment() -> None:
    """Sets what `init_process_group` reads and the launcher left out."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if len(missing) == len(names):
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    elif missing:
        raise ValueError(
            f"the launcher set some of {', '.join(names)} but not {', '.join(missing)}: "
            "use deepspeed, torchrun or srun, or set all four"
        )
    os.environ.setdefault("LOCAL_RANK", "0")
    # Other launchers than torchrun give a single process one fixed port, which a second run on the machine would
    # find taken. torchrun chooses its own, and may already serve the store there.
    if os.environ["WORLD_SIZE"] == "1" and not dist.is_torchelastic_launched():
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))


def waiting_time() -> timedelta:
    """D2S_TIMEOUT, how long a collective waits for a silent worker. Raises ValueError unless it is above 0."""
    text = os.environ.get("D2S_TIMEOUT", "30")
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float("inf"):
        raise ValueError(f"D2S_TIMEOUT is {text!r}: give minutes, above 0")
    return timedelta(minutes=minutes)


def local_batch(batch_size: int, workers: int) -> int:
    """Pairs of the global batch on each worker. Raises ValueError, with the nearest sizes, if it does not divide."""
    remainder = batch_size % workers
    if remainder:
        near = [str(size) for size in (batch_size - remainder, batch_size - remainder + workers) if size]
        raise ValueError(
            f"batch_size {batch_size} does not divide among {workers} workers: set it to {' or '.join(near)}"
        )
    return batch_size // workers


def leave(code: int, *, ordered: bool) -> NoReturn:
    """Ends this process with an exit code.

    ordered: all workers call this together, and wait for each other. Otherwise this worker failed and leaves alone;
    the watchdog then ends the others with the same code.

    It skips the interpreter's own teardown, in which a thread of gloo can abort the process.
    """
    if in_group() and ordered:
        dist.barrier()
        dist.destroy_process_group()
    if _watchdog:
        _watchdog.announce_exit(0 if ordered else code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def exit_if_another_failed() -> None:
    """Returns if this worker's error is its own; ends the process if it only follows from another worker's exit."""
    if _watchdog:
        _watchdog.exit_if_another_failed()
