"""How rows travel between workers: gathered with gradient, sent to their owners, handed around the ring.

Worker r of W holds rows r * B .. (r + 1) * B - 1 of the N = W * B rows of the global batch. Everything here adds
in an order that depends on the ranks alone, so a run with as many workers repeats itself to the last bit.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from d2s.workers.group import all_gather


def world_size() -> int:
    """The number of workers; 1 where there is no process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This worker's place among them; 0 where there is no process group."""
    return dist.get_rank() if world_size() > 1 else 0


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor, sparse: bool) -> Tensor:
        ctx.sparse = sparse
        return all_gather(rows)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.sparse:
            index = (grad != 0).any(1).nonzero().squeeze(1)  # NaN is not 0 and travels too
            return to_owners(index, grad[index], grad.shape[0] // world_size()), None
        own = grad.new_empty(grad.shape[0] // world_size(), *grad.shape[1:])
        # torch 2.13 renamed it.
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        scatter(own, grad.contiguous())
        return own, None


def gather_rows(rows: Tensor, *, sparse: bool = False) -> Tensor:
    """All workers' rows in rank order, with gradient: (B, D) -> (N, D).

    The backward *sums* over workers, so a row receives the gradient of every worker's loss. Every worker must
    hold the same number of rows. sparse: most rows of the gradient are zero, as where a loss looks at the hardest
    negatives alone; only the others travel back (the host waits for their number).
    """
    return rows if world_size() == 1 else _GatherRows.apply(rows, sparse)


def to_owners(index: Tensor, rows: Tensor, local: int) -> Tensor:
    """Sends each row to the worker that owns its place, and adds up what arrives here: (local, D).

    index: (k,) int64, places in the global batch, ascending, none twice; rows: (k, D); local: B. Each sender's
    rows are added as a whole, in the order of the ranks.
    """
    world = world_size()
    bounds = torch.arange(world + 1, device=index.device) * local
    counts = torch.searchsorted(index, bounds).diff()
    arriving = torch.empty_like(counts)
    dist.all_to_all_single(arriving, counts)
    send, receive = counts.tolist(), arriving.tolist()
    places = index.new_empty(sum(receive))
    dist.all_to_all_single(places, index.contiguous(), receive, send)
    values = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(values, rows.contiguous(), receive, send)
    own = rows.new_zeros(local, *rows.shape[1:])
    first = rank() * local
    for place, value in zip(places.split(receive), values.split(receive), strict=True):
        own.index_add_(0, place - first, value)
    return own


def pass_on(*blocks: Tensor) -> tuple[Tensor, ...]:
    """Hands the blocks to the next worker of the ring and returns those of the one before, shapes alike."""
    world, me = world_size(), rank()
    fresh = tuple(torch.empty_like(block) for block in blocks)
    ahead, behind = (me + 1) % world, (me - 1) % world
    # With two workers the one ahead is the one behind: tags keep several blocks apart.
    sends = [dist.P2POp(dist.isend, block.contiguous(), ahead, tag=n) for n, block in enumerate(blocks)]
    receives = [dist.P2POp(dist.irecv, block, behind, tag=n) for n, block in enumerate(fresh)]
    for request in dist.batch_isend_irecv([*sends, *receives]):
        request.wait()
    return fresh
