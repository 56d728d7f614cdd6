"""Exchanges rows of the global batch between workers.

The global batch has N = W * B rows. Worker r of W owns the rows r * B .. (r + 1) * B - 1. Sums over workers are taken
in rank order, so a repeated run with the same W gives the same bits.
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
    """Returns the rows of all workers in rank order, of shape (N, D), with gradient.
    The backward pass gives each row the sum of its gradients from the losses of all workers.
    rows: this worker's rows, of shape (B, D), with the same B on all workers. sparse: send only nonzero rows of the
    gradient back. This is faster if most rows are zero, but the CPU must wait for the GPU to count nonzero rows."""
    return _GatherRows.apply(rows, sparse) if several_workers() else rows


def send_to_owners(index: Tensor, rows: Tensor, local: int) -> Tensor:
    """Sends rows[j] to the worker that owns row index[j] of the global batch. All workers call this together.
    Returns a tensor of shape (B, D). Row i is the sum of all rows that workers sent for the i-th row of this worker.
    index: int64 of shape (k,), ascending, without duplicates. rows: shape (k, D). local: B, rows of one worker."""
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
    """Sends `blocks` to the next worker of the ring. Returns the blocks that the previous worker sent.
    The blocks of all workers must have the same shapes."""
    world, me = world_size(), rank()
    received = tuple(torch.empty_like(block) for block in blocks)
    following, previous = (me + 1) % world, (me - 1) % world
    # Several messages go between the same two workers. Tags tell them apart.
    sends = [dist.P2POp(dist.isend, block.contiguous(), following, tag=n) for n, block in enumerate(blocks)]
    receives = [dist.P2POp(dist.irecv, block, previous, tag=n) for n, block in enumerate(received)]
    for request in dist.batch_isend_irecv([*sends, *receives]):
        request.wait()
    return received
