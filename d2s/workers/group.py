"""Joins and leaves the process group of a run's workers, and tells this worker's rank.

The same code runs under `deepspeed`, `torchrun`, `srun` and plain `python`. They set different environment variables.
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
    """The rank and the device of this process, and the number of workers (`world`)."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process is worker 0, which writes files and prints for all workers."""
        return self.rank == 0


def in_group() -> bool:
    """Returns whether this process has joined a process group. The group may have only one worker."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Returns the number of workers; 1 without a process group."""
    return dist.get_world_size() if in_group() else 1


def rank() -> int:
    """Returns this worker's rank; 0 without a process group."""
    return dist.get_rank() if in_group() else 0


def several_workers() -> bool:
    """Returns whether there is more than one worker."""
    return world_size() > 1


def start_workers() -> Workers:
    """Joins the process group that the launcher describes. Without a launcher, creates a group of one process.
    Reads two environment variables. D2S_TIMEOUT: how many minutes a collective waits for a worker that is alive but
    does not answer; by default 30. D2S_THREADS: number of CPU threads of each worker; by default its share of cores.
    Raises ValueError if D2S_TIMEOUT or D2S_THREADS is invalid, if the launcher set only some of RANK, WORLD_SIZE,
    MASTER_ADDR and MASTER_PORT, or if two workers share a GPU or only some workers have one."""
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
    """Sets the environment variables that `init_process_group` needs, if no launcher set them.
    Raises ValueError if a launcher set only some of them."""
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
    # Launchers other than torchrun use a fixed port, which another run of one process may have taken. So choose a
    # free port. Keep the port of torchrun: torchrun chose a free one, and may already serve its store there.
    if os.environ["WORLD_SIZE"] == "1" and not dist.is_torchelastic_launched():
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))


def waiting_time() -> timedelta:
    """Returns how long a collective waits for a worker that does not answer. Reads D2S_TIMEOUT, in minutes.
    Raises ValueError if D2S_TIMEOUT is not a number above 0."""
    text = os.environ.get("D2S_TIMEOUT", "30")
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float("inf"):
        raise ValueError(f"D2S_TIMEOUT is {text!r}: give minutes, above 0")
    return timedelta(minutes=minutes)


def local_batch(batch_size: int, workers: int) -> int:
    """Returns how many pairs of the global batch each worker gets.
    Raises ValueError if `batch_size` cannot be divided evenly among the workers."""
    remainder = batch_size % workers
    if remainder:
        near = [str(size) for size in (batch_size - remainder, batch_size - remainder + workers) if size]
        raise ValueError(
            f"batch_size {batch_size} does not divide among {workers} workers: set it to {' or '.join(near)}"
        )
    return batch_size // workers


def leave(code: int, *, ordered: bool) -> NoReturn:
    """Ends this process with the exit code `code`.
    ordered: if True, all workers call this function together and wait for each other. If False, this worker failed,
    and the watchdog ends the other workers with the same exit code.
    Skips the interpreter's normal shutdown, during which a gloo thread could abort the process."""
    if in_group() and ordered:
        dist.barrier()
        dist.destroy_process_group()
    if _watchdog:
        _watchdog.announce_exit(0 if ordered else code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def exit_if_another_failed() -> None:
    """Ends this process if another worker failed first, because the error here is only a consequence of that."""
    if _watchdog:
        _watchdog.exit_if_another_failed()
