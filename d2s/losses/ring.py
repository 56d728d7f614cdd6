"""Computes a loss for a global batch too large to gather on a worker: columns travel around the ring of workers.

Gathering puts N = W * B columns on every worker. Here a worker holds its own B rows and one block of B columns, which
came from one worker. After W - 1 hops the worker has seen all blocks. For each row it accumulates a statistic over
all columns: the hardest negative, a log-sum-exp, or a sum. Most gradients need the final statistic, so the backward
pass sends the columns around again, with their gradients. After W hops the gradients are back on their own worker.

The losses equal those of `d2s.kernels.functional` with both=False: one direction, local rows against all columns.
Blocks arrive in the order me, me - 1, ..., me + 1 (modulo W), so the order of every sum is fixed.
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
    """Indices of the rows among the B local rows."""
    s: Tensor
    """(r, B) similarities. A rule without a scale may overwrite them."""
    teacher: Tensor | None
    """(r, B) similarities by the teacher's embeddings, for relational distillation; else None."""
    same_image: Tensor
    """(r, B) bool: True if row and column have the same image id."""
    own: bool
    """Whether the columns are this worker's. If so, row i of the B local rows has its positive in column i."""

    def diagonal(self, x: Tensor) -> Tensor:
        """Returns a view (r,) of the entries of x (r, B) that belong to positive pairs. Only valid if `own`."""
        return x[:, self.part.start :].diagonal()


class RingRule(Protocol):
    """Computes one loss chunk by chunk. Every forward pass uses a new object, which its backward pass reads."""

    def start(self, positive: Tensor, *factors: Tensor) -> None:
        """Initializes. positive: (B,) similarities of positive pairs. factors: none, the scale, or scale and bias."""

    def fold(self, chunk: Chunk) -> None:
        """Adds a chunk of the forward pass to the statistics of its rows."""

    def loss(self) -> Tensor:
        """Returns the loss, 0-dim, once all chunks have been folded."""

    def slope(self, chunk: Chunk) -> Tensor:
        """Returns the loss's gradient (r, B) with respect to chunk.s or, with factors, to scale * chunk.s + bias."""


class RunningLogSumExp:
    """Computes the log-sum-exp of B rows whose entries arrive in chunks, with dtype and device of `like` (B,)."""

    def __init__(self, like: Tensor) -> None:
        self.top, self.total = torch.full_like(like, -torch.inf), torch.zeros_like(like)

    def fold(self, logits: Tensor, part: slice) -> Tensor:
        """Adds logits (r, B) of the rows in `part`.

        Returns exp(old maximum - new maximum), (r,), by which the caller must multiply other sums of these rows.
        """
        top = torch.maximum(self.top[part], logits.amax(1))
        # If a row has had only -inf so far, its sum is 0. Then 0 replaces the maximum, because -inf - -inf is NaN.
        reference = torch.where(top == -torch.inf, 0, top)
        shrink = torch.exp(self.top[part] - reference)
        self.total[part] = self.total[part] * shrink + torch.exp(logits - reference[:, None]).sum(1)
        self.top[part] = top
        return shrink

    def value(self) -> Tensor:
        """Returns the log-sum-exp (B,) of all logits added so far."""
        return self.top + self.total.log()


def around_the_ring(*block: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Yields (rank, block) for every worker, this one first. Changes that the caller makes in place are passed on."""
    for hop in range(world_size()):
        yield (rank() - hop) % world_size(), block
        if hop < world_size() - 1:
            block = pass_on(*block)


def chunks(
    rows: Tensor, ids: Tensor, columns: Tensor, column_ids: Tensor, *, own: bool, width: int
) -> Iterator[Chunk]:
    """Yields the similarities of rows (B, E) with columns (B, E), a few rows at a time. ids, column_ids: (B,) each.

    width: how many of the E numbers are the student's embedding; the rest, if any, are the teacher's.
    """
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
        # The gradient is sum(slope * S) with respect to the scale, and sum(slope) with respect to the bias.
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
    """Returns the loss that `rule` computes, 0-dim: this worker's rows (B, D) against the columns of all workers.

    columns: (B, D), this worker's; the positive of row i is column i. ids: (B,) int64, image ids of the rows and of
    the columns. factors: none, the scale, or the scale and the bias, (1,) each. teacher: (B, E), teacher's embeddings
    of the rows and of the columns; gets no gradient. Rows, columns of every worker, and factors get a gradient.
    """
    return _Ring.apply(rule, rows, columns, ids, teacher, *factors)
