"""Implements the sigmoid loss of SigLIP. The forward also computes the gradients, in the same sweep.

With z = scale * S + bias, a negative costs log(1 + exp(z)), and its gradient with respect to z is sigmoid(z).
A positive costs log(1 + exp(-z)), and its gradient is -sigmoid(-z).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

from d2s.kernels.chunked.common import SamePairs, Sweep, full_precision, positive_entries, row_dots, upcast
from d2s.kernels.sides import Sides

# Above this x, softplus(x) = x exactly, even in float64. torch's default, 20, has an error of 2e-9.
LINEAR_FROM = 60.0


def sigmoid_forward(
    sides: Sides, scale: Tensor, bias: Tensor, need: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns (loss, d_image, d_text, d_scale, d_bias), all in the accumulator type.

    The loss has shape (). Each gradient has the shape of its input, or is empty if `need` does not select it.
    """
    image, text, image_ids, text_ids, offset, _ = sides
    need_image, need_text, need_scale, need_bias = need
    with full_precision(image.device):
        rows, columns = upcast(image), upcast(text)
        n = rows.shape[0]
        factor, shift = (x.to(rows.dtype).reshape(()) for x in (scale, bias))
        same = SamePairs(image_ids, text_ids)
        matched = columns[offset : offset + n]
        positive = factor * row_dots(rows, matched) + shift
        loss = softplus(-positive, threshold=LINEAR_FROM).sum()
        pull = torch.sigmoid(-positive)
        need_rows = need_image or need_scale
        d_rows = torch.empty_like(rows) if need_rows else rows.new_empty(0)
        d_columns = torch.zeros_like(columns) if need_text else rows.new_empty(0)
        d_bias = -pull.sum()
        for start, stop, s in Sweep(rows, columns):
            s.mul_(factor).add_(shift)
            positive_entries(s, start, offset).fill_(-torch.inf)
            same.fill(s, start, stop, -torch.inf)
            loss += softplus(s, threshold=LINEAR_FROM).sum()
            if need_rows or need_text or need_bias:
                p = s.sigmoid_()
                d_bias += p.sum()
            if need_rows:
                torch.mm(p, columns, out=d_rows[start:stop])
            if need_text:
                d_columns.addmm_(p.t(), rows[start:stop])
        if need_rows:
            d_rows.addcmul_(pull[:, None], matched, value=-1)
        if need_text:
            d_columns[offset : offset + n].addcmul_(pull[:, None], rows, value=-1)
        d_scale = row_dots(d_rows, rows).sum().reshape(scale.shape) if need_scale else rows.new_empty(0)
        return (
            loss,
            d_rows.mul_(factor) if need_image else rows.new_empty(0),
            d_columns.mul_(factor),
            d_scale,
            d_bias.reshape(bias.shape) if need_bias else rows.new_empty(0),
        )
