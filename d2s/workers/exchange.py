"""Exchanges rows between workers: gathers them with gradient, sends them to their owners, passes them around a ring.

The global batch has N = W * B rows. Worker r of W owns the rows r * B .. (r + 1) * B - 1. Every sum is taken in rank
order, so a repeated run with the same W gives the same bits.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from d2s.workers.collectives import all_gather
from d2s.workers.group import rank, several_workers, world_size


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor, sparse: bool) -> Tensor:
        ctx.sparse = sparse
        return all_gather(rows)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.sparse:
            index = (grad != 0).any(1).nonzero().squeeze(1)  # NaN != 0, so NaN travels too
            return send_to_owners(index, grad[index], grad.shape[0] // world_size()), None
        own = grad.new_empty(grad.shape[0] // world_size(), *grad.shape[1:])
        # torch 2.13 renamed reduce_scatter_tensor.
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        scatter(own, grad.contiguous())
        return own, None


def gather_rows(rows: Tensor, *, sparse: bool = False) -> Tensor:
    """Returns the rows of all workers in rank order, with gradient: (B, D) -> (N, D). All workers have the same B.

    The backward pass gives each row the sum of its gradients from the losses of all workers.

    sparse: send only the nonzero rows of the gradient back; useful if most are zero, as with hardest negatives. The
    host then waits for the GPU, to learn how many rows are nonzero.
    """
    return _GatherRows.apply(rows, sparse) if several_workers() else rows


def send_to_owners(index: Tensor, rows: Tensor, local: int) -> Tensor:
    """Sends rows[j] to the worker that owns row index[j] of the global batch. All workers call it together.

    Returns (B, D): for each row that this worker owns, the sum of all rows that workers sent for it.
    index: (k,) int64, ascending and distinct. rows: (k, D). local: B, the number of rows that a worker owns.
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
    """Sends `blocks` to the next rank of the ring. Returns the blocks, of the same shapes, from the previous rank."""
    world, me = world_size(), rank()
    received = tuple(torch.empty_like(block) for block in blocks)
    following, previous = (me + 1) % world, (me - 1) % world
    # If there are two workers, the next and the previous rank are the same; tags tell the blocks apart.
    sends = [dist.P2POp(dist.isend, block.contiguous(), following, tag=n) for n, block in enumerate(blocks)]
    receives = [dist.P2POp(dist.irecv, block, previous, tag=n) for n, block in enumerate(received)]
    for request in dist.batch_isend_irecv([*sends, *receives]):
        request.wait()
    return received
