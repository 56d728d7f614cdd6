"""Symmetric InfoNCE with a learnable scale: one sweep forward, one recomputing sweep backward."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from d2s.kernels.chunked.common import SamePairs, Sweep, full_precision, positive_entries, upcast


def info_nce_loss(
    image: Tensor,
    text: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    *,
    scale: Tensor,
    offset: int,
    both: bool,
) -> Tensor:
    """See `d2s.kernels.functional.info_nce_loss`."""
    return _InfoNCE.apply(image, text, image_ids, text_ids, scale, offset, both)


def _logits(s: Tensor, scale: Tensor, same: SamePairs, start: int, stop: int, offset: int) -> Tensor:
    """Scales the chunk s in place and leaves out its same-image entries; gives its positives (rows,)."""
    s *= scale
    diagonal = positive_entries(s, start, offset)
    positive = diagonal.clone()
    same.fill(s, start, stop, -torch.inf)
    diagonal.copy_(positive)
    return positive


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, image_ids, text_ids, scale, offset, both):
        with full_precision(image.device):
            rows, columns = upcast(image), upcast(text)
            n, m = rows.shape[0], columns.shape[0]
            factor = scale.detach().to(rows.dtype)
            same = SamePairs(image_ids, text_ids)
            positive, row_lse = rows.new_empty(n), rows.new_empty(n)
            top = rows.new_full((m,), -torch.inf)
            total = rows.new_zeros(m)
            sweep = Sweep(rows, columns)
            buffer = torch.empty_like(sweep.buffer)
            for start, stop, s in sweep:
                positive[start:stop] = _logits(s, factor, same, start, stop, offset)
                row_top = s.amax(1, keepdim=True)
                row_total = torch.sub(s, row_top, out=buffer[: stop - start]).exp_().sum(1)
                row_lse[start:stop] = row_top.squeeze(1) + row_total.log_()
                if both:
                    new = torch.maximum(top, s.amax(0))
                    # Nothing seen yet in a column: any finite reference will do for its empty sum.
                    reference = torch.where(new == -torch.inf, 0, new)
                    total *= torch.exp(top - reference)
                    total += s.sub_(reference).exp_().sum(0)
                    top = new
            loss = 0.5 * (row_lse - positive).sum()
            column_lse = None
            if both:
                column_lse = top + torch.log(total)
                loss = loss + 0.5 * (column_lse - positive).sum()
        ctx.save_for_backward(image, text, image_ids, text_ids, scale, row_lse, column_lse)
        ctx.offset = offset
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        image, text, image_ids, text_ids, scale, row_lse, column_lse = ctx.saved_tensors
        offset, both = ctx.offset, column_lse is not None
        with full_precision(image.device):
            rows, columns = upcast(image), upcast(text)
            n = rows.shape[0]
            factor = scale.detach().to(rows.dtype)
            half = 0.5 * grad
            same = SamePairs(image_ids, text_ids)
            d_rows, d_columns = torch.empty_like(rows), torch.zeros_like(columns)
            sweep = Sweep(rows, columns)
            buffer = torch.empty_like(sweep.buffer)
            for start, stop, s in sweep:
                _logits(s, factor, same, start, stop, offset)
                p = torch.sub(s, row_lse[start:stop, None], out=buffer[: stop - start]).exp_()
                if both:
                    p += s.sub_(column_lse).exp_()
                torch.mm(p, columns, out=d_rows[start:stop])
                d_columns.addmm_(p.t(), rows[start:stop])
            matched = columns[offset : offset + n]
            pull = 2.0 if both else 1.0
            d_rows -= pull * matched
            d_columns[offset : offset + n] -= pull * rows
            # The loss depends on scale * S alone, so the sum of dS * S is the product of rows and gradient.
            d_scale = half * (d_rows * rows).sum()
            d_rows *= half * factor
            d_columns *= half * factor
        need = ctx.needs_input_grad
        return (
            d_rows.to(image.dtype) if need[0] else None,
            d_columns.to(text.dtype) if need[1] else None,
            None,
            None,
            d_scale.reshape(scale.shape).to(scale.dtype) if need[4] else None,
            None,
            None,
        )
