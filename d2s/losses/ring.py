"""Computes a loss for a global batch that is too large to gather on one worker.

Gathering puts N = W * B columns on every worker. Here a worker holds its own B rows and one block of B columns. The
blocks travel around a ring: in each hop, every worker sends its block to the next worker. After W - 1 hops a worker
has seen all blocks. For each row it accumulates a statistic over all columns: the hardest negative, a log-sum-exp, or
a sum. Most gradients need the final statistic. So the backward pass sends the columns around the ring again, together
with their gradients. After W hops the gradients are back on the worker that owns the columns.

A loss computed here equals the loss in `d2s.kernels.functional` with both=False: local rows against all columns.
Worker k gets the blocks of workers k, k - 1, ..., k + 1 (modulo W) in this order. So the order of every sum is fixed.
Sizes: B local rows, r rows of a chunk, D width, W workers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from d2s.workers.exchange import pass_on
from d2s.workers.group import rank, world_size

_CHUNK_ENTRIES = 1 << 21
"""How many entries of the similarity matrix are computed at a time."""


@dataclass
class Chunk:
    """The similarities of r local rows with one block of columns."""

    part: slice
    """The positions of the r rows among the B local rows."""
    s: Tensor
    """Similarities, of shape (r, B). A rule without a scale may overwrite them."""
    teacher: Tensor | None
    """Similarities of the teacher's embeddings, of shape (r, B), for relational distillation; otherwise None."""
    same_image: Tensor
    """Boolean, of shape (r, B). An entry is True if its row and its column have the same image id."""
    own: bool
    """True if the columns belong to this worker. If so, column i is the positive of local row i."""

    def diagonal(self, x: Tensor) -> Tensor:
        """Returns the entries of `x` at positive pairs, as a view. Must only be called if `own` is True.
        x: shape (r, B). The result has shape (r,)."""
        return x[:, self.part.start :].diagonal()


class RingRule(Protocol):
    """Computes one loss chunk by chunk. Every forward pass needs a new object. The backward pass reads it."""

    def start(self, positive: Tensor, *factors: Tensor) -> None:
        """Prepares for the first chunk.
        positive: similarities of the positive pairs, of shape (B,). factors: see :func:`ring_loss`."""

    def fold(self, chunk: Chunk) -> None:
        """Adds `chunk` to the statistics of its rows. Called in the forward pass."""

    def loss(self) -> Tensor:
        """Returns the loss, of shape (). Called when every chunk has been passed to `fold`."""

    def slope(self, chunk: Chunk) -> Tensor:
        """Returns the gradient of the loss with respect to the similarities `chunk.s`, of shape (r, B). If the rule
        has factors, the gradient is with respect to scale * chunk.s + bias. Called in the backward pass."""


class RunningLogSumExp:
    """Computes the log-sum-exp of each of B rows. The entries of the rows arrive in chunks.
    like: a tensor of shape (B,). The results have its dtype and device."""

    def __init__(self, like: Tensor) -> None:
        self.top, self.total = torch.full_like(like, -torch.inf), torch.zeros_like(like)

    def fold(self, logits: Tensor, part: slice) -> Tensor:
        """Adds entries to the r rows at the positions `part`. logits: the entries, of shape (r, B).
        Returns exp(old maximum - new maximum) of each row, of shape (r,). If the caller keeps other sums of
        exp(logit - maximum), it must multiply them by this factor."""
        top = torch.maximum(self.top[part], logits.amax(1))
        # If a row has had only -inf so far, use 0 in place of its maximum, because -inf - -inf is NaN.
        reference = torch.where(top == -torch.inf, 0, top)
        shrink = torch.exp(self.top[part] - reference)
        self.total[part] = self.total[part] * shrink + torch.exp(logits - reference[:, None]).sum(1)
        self.top[part] = top
        return shrink

    def value(self) -> Tensor:
        """Returns the log-sum-exp of all logits added so far, of shape (B,)."""
        return self.top + self.total.log()


def around_the_ring(*block: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Sends blocks around the ring. Yields every worker's rank and `block`, first this worker's own.
    If the caller changes a block in place, the next worker gets the changed block."""
    for hop in range(world_size()):
        yield (rank() - hop) % world_size(), block
        if hop < world_size() - 1:
            block = pass_on(*block)


def chunks(
    rows: Tensor, ids: Tensor, columns: Tensor, column_ids: Tensor, *, own: bool, width: int
) -> Iterator[Chunk]:
    """Computes the similarities of `rows` with `columns`. Yields them as chunks of a few rows.
    rows, columns: shape (B, E). The first `width` of the E numbers are the student's embedding. The rest, if any, is
    the teacher's. ids, column_ids: image ids, of shape (B,). own: see :class:`Chunk`."""
    size = max(1, _CHUNK_ENTRIES // columns.shape[0])
    for start in range(0, rows.shape[0], size):
        part = slice(start, min(start + size, rows.shape[0]))
        teacher = rows[part, width:] @ columns[:, width:].t() if width < rows.shape[1] else None
        s = rows[part, :width] @ columns[:, :width].t()
        yield Chunk(part, s, teacher, ids[part, None] == column_ids, own)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rule: RingRule, rows, columns, ids, teacher, *factors):
        rows_, columns_ = rows.detach(), columns.detach()
        width = rows.shape[1]
        if teacher is not None:
            rows_, columns_ = torch.cat([rows_, teacher], 1), torch.cat([columns_, teacher], 1)
        with torch.autocast(rows.device.type, enabled=False):
            positive = (rows_[:, :width] * columns_[:, :width]).sum(1)
            rule.start(positive, *(factor.detach().to(rows.dtype) for factor in factors))
            for owner, block in around_the_ring(columns_, ids):
                for chunk in chunks(rows_, ids, *block, own=owner == rank(), width=width):
                    rule.fold(chunk)
        ctx.save_for_backward(rows_, columns_, ids, *factors)
        ctx.rule, ctx.width = rule, width
        return rule.loss()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        rows, columns, ids, *factors = ctx.saved_tensors
        width, own_rows = ctx.width, rows[:, : ctx.width]
        d_rows = torch.zeros_like(own_rows)
        # The gradient with respect to the scale is sum(slope * S), with respect to the bias sum(slope).
        d_factors = [rows.new_zeros(()) for _ in factors]
        scale = factors[0].to(rows.dtype) if factors else 1.0
        with torch.autocast(rows.device.type, enabled=False):
            blocks = around_the_ring(columns, ids, torch.zeros_like(own_rows))
            for owner, (block, block_ids, d_block) in blocks:
                for chunk in chunks(rows, ids, block, block_ids, own=owner == rank(), width=width):
                    slope = ctx.rule.slope(chunk)
                    if factors:  # a rule with a scale does not overwrite chunk.s
                        d_factors[0] += (slope * chunk.s).sum()
                    if len(factors) > 1:
                        d_factors[1] += slope.sum()
                    d_rows[chunk.part] += slope @ block[:, :width]
                    d_block += slope.t() @ own_rows[chunk.part]
            (d_columns,) = pass_on(d_block)
        d_factors = [
            (grad * d).reshape(factor.shape).to(factor.dtype)
            for d, factor in zip(d_factors, factors, strict=True)
        ]
        return None, grad * scale * d_rows, grad * scale * d_columns, None, None, *d_factors


def ring_loss(
    rule: RingRule,
    rows: Tensor,
    columns: Tensor,
    ids: Tensor,
    *factors: Tensor,
    teacher: Tensor | None = None,
) -> Tensor:
    """Returns the loss of this worker's rows against the columns of all workers, of shape (), computed by `rule`.
    rows, columns: this worker's embeddings, of shape (B, D); the positive of row i is column i. ids: image ids,
    int64 of shape (B,), for rows and columns. factors: nothing, the scale, or scale and bias, of shape (1,).
    teacher: the teacher's embeddings for rows and columns, of shape (B, E). The loss has a gradient with respect to
    the rows, the columns of every worker, and the factors."""
    return _Ring.apply(rule, rows, columns, ids, teacher, *factors)
