"""Workers: who this process is, how workers exchange rows, and how a process leaves in order.

The same file runs under `deepspeed`, `torchrun`, `srun` and plain `python`: only the environment differs.
Gradients travel through :func:`gather_rows`, whose backward adds up what every worker's loss asks of a row.
"""

import os
import socket
import sys
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor


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

    Raises ValueError where a launcher set only some of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
    """
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
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        _share_cores()
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    return Workers(rank=dist.get_rank(), world=dist.get_world_size(), local_rank=local_rank, device=device)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _share_cores() -> None:
    """Launchers set one thread a process or none at all; on a CPU every worker takes its even share."""
    if "D2S_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["D2S_THREADS"]))
        return
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))


def leave(code: int) -> NoReturn:
    """Ends this process after the others have come this far too.

    A gloo thread may want the interpreter while it is being torn down and abort the process; leaving without
    the tear-down, after an ordered goodbye, avoids it.
    """
    if dist.is_initialized() and code == 0:  # a failed worker waits for nobody
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor) -> Tensor:
        ctx.rows = rows.shape[0]
        return all_gather(rows)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        first = dist.get_rank() * ctx.rows
        return grad[first : first + ctx.rows]


def gather_rows(rows: Tensor) -> Tensor:
    """All workers' rows in rank order, with gradient: (B, D) -> (N, D), N = W * B.

    The backward *sums* over workers, so a row receives the gradient of every worker's loss. Every worker must
    hold the same number of rows.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    return _GatherRows.apply(rows)


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


def agree(flag: bool, device: torch.device) -> bool:
    """True on every worker if it is true on any of them."""
    return bool(sum_over_workers(torch.tensor([float(flag)], device=device)).item() > 0)


def barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
