"""Losses whose gathered side does not fit on a worker: blocks of columns travel around the ring of workers.

Gathering puts N = W * B columns on every worker. Here a worker holds its own B rows and one block of B columns. In
W - 1 hops it sees all blocks and folds what each row needs to know of all columns: its hardest negative, a
log-sum-exp, or a sum. Most gradients need the finished numbers, so the backward pass sends the columns around once
more, together with their gradients, which are home after W hops.

The values equal those of `d2s.kernels.functional` with both=False: one direction, local rows against all columns.
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
"""Entries of the similarity matrix computed at a time."""


@dataclass
class Chunk:
    """Some local rows against one block of columns."""

    part: slice
    """Which of the local rows."""
    s: Tensor
    """(r, B) similarities; a rule without a scale may overwrite them."""
    teacher: Tensor | None
    """(r, B) similarities of the teacher, for relational distillation."""
    same_image: Tensor
    """(r, B) bool: both sides show the same image."""
    own: bool
    """The block is this worker's own, with the positive pairs on its diagonal."""

    def diagonal(self, x: Tensor) -> Tensor:
        """A view (r,) of the positive pairs in x (r, B), for a chunk of the worker's own block."""
        return x[:, self.part.start :].diagonal()


class RingRule(Protocol):
    """How a loss is folded over chunks; a new object for every forward pass."""

    def start(self, positive: Tensor, *factors: Tensor) -> None:
        """Begins. positive: (B,) similarities of the local pairs. factors: none, the scale, or scale and bias."""

    def fold(self, chunk: Chunk) -> None:
        """Takes in a chunk of the forward pass."""

    def loss(self) -> Tensor:
        """The loss, 0-dim, after the last chunk."""

    def slope(self, chunk: Chunk) -> Tensor:
        """(r, B) gradient with respect to the similarities, or to scale * S + bias for a rule with factors."""


class RunningLogSumExp:
    """log-sum-exp of rows whose entries come in chunks: (B,) each, with the dtype and device of `like` (B,)."""

    def __init__(self, like: Tensor) -> None:
        self.top, self.total = torch.full_like(like, -torch.inf), torch.zeros_like(like)

    def fold(self, logits: Tensor, part: slice) -> Tensor:
        """Takes in logits (r, B) of the rows `part`; returns the factor (r,) on all sums relative to the old top."""
        top = torch.maximum(self.top[part], logits.amax(1))
        # A row without any finite entry so far has an empty sum: any finite reference serves.
        reference = torch.where(top == -torch.inf, 0, top)
        shrink = torch.exp(self.top[part] - reference)
        self.total[part] = self.total[part] * shrink + torch.exp(logits - reference[:, None]).sum(1)
        self.top[part] = top
        return shrink

    def value(self) -> Tensor:
        """(B,) log-sum-exp of everything taken in."""
        return self.top + self.total.log()


def around_the_ring(*block: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Yields (owner, block) of every worker, this one's first. Sums added to a block in place travel on."""
    for hop in range(world_size()):
        yield (rank() - hop) % world_size(), block
        if hop < world_size() - 1:
            block = pass_on(*block)


def chunks(
    rows: Tensor, ids: Tensor, columns: Tensor, column_ids: Tensor, *, own: bool, width: int
) -> Iterator[Chunk]:
    """Rows (B, D) against columns (B, D), each with its ids (B,). Entries beyond `width` are the teacher's."""
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
        # sum(slope * S) for the scale, sum(slope) for the bias.
        d_factors = [rows.new_zeros(()) for _ in factors]
        scale = factors[0].to(rows.dtype) if factors else 1.0
        with torch.autocast(rows.device.type, enabled=False):
            blocks = around_the_ring(columns, ids, torch.zeros_like(own_rows))
            for owner, (block, block_ids, d_block) in blocks:
                for chunk in chunks(rows, ids, block, block_ids, own=owner == rank(), width=width):
                    slope = ctx.rule.slope(chunk)
                    if factors:  # the rules that have a scale leave chunk.s as it is
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
    """The loss of the local rows (B, D) against all workers' columns (B, D each), by `rule`: 0-dim.

    Row i's positive is column i of the same worker. ids: (B,) int64, of rows and columns alike. factors: none, the
    scale, or scale and bias, (1,) each. teacher: (B, E), of rows and columns alike, without gradient. Gradients flow
    to rows, to the columns of every worker, and to the factors.
    """
    return _Ring.apply(rule, rows, columns, ids, teacher, *factors)
