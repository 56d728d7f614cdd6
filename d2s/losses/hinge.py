"""The triplet hinge loss of VSE++ (Faghri et al. 2018).

During the warm-up the loss sums over all negatives. Afterwards it uses only the hardest negative of each row.
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from d2s.kernels import functional as F
from d2s.losses.base import Alignment, Sides
from d2s.losses.ring import Chunk, around_the_ring, chunks, ring_loss
from d2s.workers.exchange import send_to_owners
from d2s.workers.group import rank

_INDEX_BYTES = 8


class Hinge(Alignment):
    """The hinge loss max(0, margin + S_negative - S_positive), where S is a similarity, summed over rows.
    If `warmup` is below 1, sums also over all negatives of a row, and multiplies the sum by `warmup`. If `warmup` is
    1, uses only the hardest negative of each row: the most similar one."""

    def sparse_gradient(self, warmup: float) -> bool:
        return warmup >= 1

    def value(self, sides: Sides, factors: tuple[Tensor, ...], warmup: float) -> Tensor:
        hardest = warmup >= 1
        loss = F.hinge_loss(
            *sides[:4], margin=self.config.margin, hardest=hardest, offset=sides.offset, both=sides.both
        )
        return loss if hardest else warmup * loss

    def ring_value(self, sides: Sides, factors: tuple[Tensor, ...], warmup: float) -> Tensor:
        if warmup >= 1:
            return _HardestRing.apply(*sides[:3], self.config.margin)
        return warmup * ring_loss(_SumRule(self.config.margin), *sides[:3])

    def bytes_sent(self, workers: int, local: int, row: int) -> tuple[int, int]:
        # After the warm-up, the gradient and the index of each hardest negative go to the worker that owns it.
        back = 2 * (workers - 1) * local * (row + _INDEX_BYTES) // workers
        return 2 * (workers - 1) * local * row, back


class _SumRule:
    """The ring rule (:class:`d2s.losses.ring.RingRule`) of the hinge over all negatives.
    Counts in `active`, of shape (B,), how many negatives of each row have a loss above 0."""

    def __init__(self, margin: float) -> None:
        self.margin = margin

    def start(self, positive: Tensor) -> None:
        self.limit = positive - self.margin
        self.cost, self.active = positive.new_zeros(()), torch.zeros_like(positive)

    def fold(self, chunk: Chunk) -> None:
        violation = self._violation(chunk)
        self.cost += violation.sum()
        self.active[chunk.part] += violation.sign_().sum(1)

    def _violation(self, chunk: Chunk) -> Tensor:
        return chunk.s.masked_fill_(chunk.same_image, -torch.inf).sub_(self.limit[chunk.part, None]).relu_()

    def loss(self) -> Tensor:
        return self.cost

    def slope(self, chunk: Chunk) -> Tensor:
        slope = self._violation(chunk).sign_()
        if chunk.own:
            chunk.diagonal(slope).sub_(self.active[chunk.part])
        return slope


class _HardestRing(torch.autograd.Function):
    """Computes the hinge loss with the hardest negative of each row, around the ring of workers.
    If several negatives are equally hard, takes the one with the lowest index in the global batch. The forward pass
    keeps the hardest negatives, so the backward pass does not send columns around the ring again."""

    @staticmethod
    def forward(ctx, rows, columns, ids, margin: float):
        rows_, columns_ = rows.detach(), columns.detach()
        local = rows.shape[0]
        best, index = rows_.new_full((local,), -torch.inf), ids.new_zeros(local)
        winner = torch.zeros_like(rows_)
        with torch.autocast(rows.device.type, enabled=False):
            for owner, block in around_the_ring(columns_, ids):
                for chunk in chunks(rows_, ids, *block, own=owner == rank(), width=rows.shape[1]):
                    part = chunk.part
                    top, place = chunk.s.masked_fill_(chunk.same_image, -torch.inf).max(1)
                    place += owner * local
                    # Blocks do not arrive in rank order. So compare indices to find the lowest one in a tie.
                    better = (top > best[part]) | ((top == best[part]) & (place < index[part]))
                    better &= top > -torch.inf
                    best[part] = torch.where(better, top, best[part])
                    index[part] = torch.where(better, place, index[part])
                    candidate = block[0][place - owner * local]
                    winner[part] = torch.where(better[:, None], candidate, winner[part])
            cost = (margin + best - (rows_ * columns_).sum(1)).clamp_min(0)
        ctx.save_for_backward(rows_, columns_, winner, index, cost > 0)
        return cost.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        rows, columns, winner, index, active = ctx.saved_tensors
        weight = active.to(rows.dtype)[:, None] * grad
        places, sums = _sum_by_index(index[active], (rows * weight)[active])
        d_columns = send_to_owners(places, sums, rows.shape[0]) - rows * weight
        return (winner - columns) * weight, d_columns, None, None


def _sum_by_index(index: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Adds up the rows that have the same index. Returns the u distinct indices, ascending, and the u sums.
    index: shape (k,). rows: shape (k, D); rows[j] belongs to index[j]. The sums have shape (u, D)."""
    places, inverse, counts = torch.unique(index, return_inverse=True, return_counts=True)
    if not len(places):
        return places, rows
    # embedding_bag adds the rows of an index in a fixed order; index_add_ on a GPU does not.
    order = torch.argsort(inverse, stable=True)
    return places, embedding_bag(order, rows, counts.cumsum(0) - counts, mode="sum")
