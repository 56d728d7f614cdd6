"""The hinge of VSE++ over a batch: all violations, or the hardest negative of each row and column."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from d2s.kernels.chunked.common import (
    SamePairs,
    Sweep,
    column_maxima,
    full_precision,
    positive_entries,
    row_maxima,
    upcast,
)


def hinge_loss(
    image: Tensor,
    text: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    *,
    margin: float,
    hardest: bool,
    offset: int,
    both: bool,
) -> Tensor:
    """See `d2s.kernels.functional.hinge_loss`."""
    wanted = torch.is_grad_enabled() and (image.requires_grad or text.requires_grad)
    function = _HingeMax if hardest else _HingeSum
    return function.apply(image, text, image_ids, text_ids, margin, offset, both, wanted)


def _sum_rows(index: Tensor, source: Tensor, weight: Tensor, target: Tensor, size: int) -> Tensor:
    """out[target[k]] += weight[k] * source[index[k]], (size, D); one owner a row, who adds in order."""
    order = torch.argsort(target, stable=True)
    starts = torch.searchsorted(target[order], torch.arange(size, device=target.device))
    return embedding_bag(index[order], source, starts, mode="sum", per_sample_weights=weight[order])


class _HingeMax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, image_ids, text_ids, margin, offset, both, wanted):
        with full_precision(image.device):
            rows, columns = upcast(image), upcast(text)
            n, m = rows.shape[0], columns.shape[0]
            same = SamePairs(image_ids, text_ids)
            positive = rows.new_empty(n)
            row_best, row_at = rows.new_empty(n), image_ids.new_empty(n)
            column_best = rows.new_full((m,), -torch.inf)
            column_at = image_ids.new_zeros(m)
            for start, stop, s in Sweep(rows, columns):
                diagonal = positive_entries(s, start, offset)
                positive[start:stop] = diagonal
                diagonal.fill_(-torch.inf)
                same.fill(s, start, stop, -torch.inf)
                row_best[start:stop], row_at[start:stop] = row_maxima(s)
                if both:
                    best, at = column_maxima(s)
                    # Only a strictly larger value replaces: the lowest index keeps a tie.
                    better = best > column_best
                    column_best = torch.where(better, best, column_best)
                    column_at = torch.where(better, at + start, column_at)
            row_cost = (margin + row_best - positive).clamp_min(0)
            loss = row_cost.sum()
            if both:
                column_cost = (margin + column_best - positive).clamp_min(0)
                loss = loss + column_cost.sum()
        if wanted:
            here = torch.arange(n, device=image.device)
            i, j, active = here, row_at, row_cost > 0
            if both:
                i = torch.cat([i, column_at])
                j = torch.cat([j, here])
                active = torch.cat([active, column_cost > 0])
            ctx.save_for_backward(rows, columns, i, j, active)
        ctx.offset, ctx.types = offset, (image.dtype, text.dtype)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, columns, i, j, active = ctx.saved_tensors
        n, m = rows.shape[0], columns.shape[0]
        weight = active.to(rows.dtype) * grad
        # Where each violation's positive stands: its row's for the first n, its column's for the others.
        here = torch.arange(n, device=rows.device).repeat(i.shape[0] // n)
        i_all, j_all = torch.cat([i, here]), torch.cat([j, here + ctx.offset])
        weights = torch.cat([weight, -weight])
        grads = [None, None]
        if ctx.needs_input_grad[0]:
            grads[0] = _sum_rows(j_all, columns, weights, i_all, n).to(ctx.types[0])
        if ctx.needs_input_grad[1]:
            grads[1] = _sum_rows(i_all, rows, weights, j_all, m).to(ctx.types[1])
        return *grads, None, None, None, None, None, None


class _HingeSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, image_ids, text_ids, margin, offset, both, wanted):
        with full_precision(image.device):
            rows, columns = upcast(image), upcast(text)
            n = rows.shape[0]
            same = SamePairs(image_ids, text_ids)
            matched = columns[offset : offset + n]
            positive = (rows * matched).sum(1)
            loss = rows.new_zeros(())
            d_rows = torch.zeros_like(rows) if wanted else None
            d_columns = torch.zeros_like(columns) if wanted else None
            pull = rows.new_zeros(n)
            sweep = Sweep(rows, columns)
            active = torch.empty_like(sweep.buffer)
            for start, stop, s in sweep:
                positive_entries(s, start, offset).fill_(-torch.inf)
                same.fill(s, start, stop, -torch.inf)
                # The sign of a clamped violation is 1 or 0: what its pair gets as gradient.
                a = torch.sub(s, positive[start:stop, None] - margin, out=active[: stop - start])
                loss += a.relu_().sum()
                pull[start:stop] += a.sign_().sum(1)
                if both:
                    loss += s.sub_(positive - margin).relu_().sum()
                    pull += s.sign_().sum(0)
                    a += s
                if wanted:
                    torch.mm(a, columns, out=d_rows[start:stop])
                    d_columns.addmm_(a.t(), rows[start:stop])
            if wanted:
                d_rows -= pull[:, None] * matched
                d_columns[offset : offset + n] -= pull[:, None] * rows
                ctx.save_for_backward(d_rows, d_columns)
        ctx.types = (image.dtype, text.dtype)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        d_rows, d_columns = ctx.saved_tensors
        image = (grad * d_rows).to(ctx.types[0]) if ctx.needs_input_grad[0] else None
        text = (grad * d_columns).to(ctx.types[1]) if ctx.needs_input_grad[1] else None
        return image, text, None, None, None, None, None, None
