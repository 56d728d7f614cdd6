"""Symmetric InfoNCE with a learnable scale: one sweep forward, one recomputing sweep backward."""

import torch
from torch import Tensor

from d2s.kernels.chunked.common import SamePairs, Sweep, full_precision, positive_entries, upcast


def _logits(s: Tensor, scale: Tensor, same: SamePairs, start: int, stop: int, offset: int) -> Tensor:
    """Scales the chunk s in place and leaves out its same-image entries; gives its positives (rows,)."""
    s *= scale
    diagonal = positive_entries(s, start, offset)
    positive = diagonal.clone()
    same.fill(s, start, stop, -torch.inf)
    diagonal.copy_(positive)
    return positive


def info_nce_forward(
    image: Tensor,
    text: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    scale: Tensor,
    offset: int,
    both: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss (), row_lse (n,), column_lse (M,) or empty without both), all acc: log-sum-exp of scale * S.

    Arguments as in `d2s.kernels.functional.info_nce_loss`.
    """
    with full_precision(image.device):
        rows, columns = upcast(image), upcast(text)
        n, m = rows.shape[0], columns.shape[0]
        factor = scale.to(rows.dtype).reshape(())
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
        if not both:
            return loss, row_lse, rows.new_empty(0)
        column_lse = top + torch.log(total)
        return loss + 0.5 * (column_lse - positive).sum(), row_lse, column_lse


def info_nce_backward(
    grad: Tensor,
    image: Tensor,
    text: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    scale: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    offset: int,
    both: bool,
    need_image: bool,
    need_text: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_image (n, D), d_text (M, D), d_scale like scale) in the types of the inputs; grad ()."""
    with full_precision(image.device):
        rows, columns = upcast(image), upcast(text)
        n = rows.shape[0]
        factor = scale.to(rows.dtype).reshape(())
        half = 0.5 * grad
        same = SamePairs(image_ids, text_ids)
        d_rows = torch.empty_like(rows) if need_image or need_scale else rows.new_empty(0)
        d_columns = torch.zeros_like(columns) if need_text else rows.new_empty(0)
        sweep = Sweep(rows, columns)
        buffer = torch.empty_like(sweep.buffer)
        for start, stop, s in sweep:
            _logits(s, factor, same, start, stop, offset)
            p = torch.sub(s, row_lse[start:stop, None], out=buffer[: stop - start]).exp_()
            if both:
                p += s.sub_(column_lse).exp_()
            if need_image or need_scale:
                torch.mm(p, columns, out=d_rows[start:stop])
            if need_text:
                d_columns.addmm_(p.t(), rows[start:stop])
        pull = 2.0 if both else 1.0
        d_scale = scale.new_empty(0)
        if need_image or need_scale:
            d_rows -= pull * columns[offset : offset + n]
            if need_scale:
                # The loss depends on scale * S alone, so the sum of dS * S is the product of rows and gradient.
                d_scale = (half * (d_rows * rows).sum()).reshape(scale.shape).to(scale.dtype)
        if need_text:
            d_columns[offset : offset + n] -= pull * rows
        return (
            d_rows.mul_(half * factor).to(image.dtype) if need_image else image.new_empty(0),
            d_columns.mul_(half * factor).to(text.dtype),
            d_scale,
        )
