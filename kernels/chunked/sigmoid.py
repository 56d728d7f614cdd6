"""The sigmoid loss of SigLIP: no normaliser, so the gradient is made in the forward sweep."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

from d2s.kernels.chunked.common import SamePairs, Sweep, full_precision, positive_entries, upcast

# Above it log(1 + exp(x)) is x in float64 too; torch's own threshold of 20 costs 2e-9.
EXACT = 60.0


def sigmoid_loss(
    image: Tensor,
    text: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    *,
    scale: Tensor,
    bias: Tensor,
    offset: int,
) -> Tensor:
    """See `d2s.kernels.functional.sigmoid_loss`."""
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (image, text, scale, bias))
    return _Sigmoid.apply(image, text, image_ids, text_ids, scale, bias, offset, wanted)


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, image_ids, text_ids, scale, bias, offset, wanted):
        with full_precision(image.device):
            rows, columns = upcast(image), upcast(text)
            n = rows.shape[0]
            factor, shift = scale.detach().to(rows.dtype), bias.detach().to(rows.dtype)
            same = SamePairs(image_ids, text_ids)
            matched = columns[offset : offset + n]
            positive = factor * (rows * matched).sum(1) + shift
            loss = softplus(-positive, threshold=EXACT).sum()
            pull = torch.sigmoid(-positive)
            d_rows, d_columns = torch.empty_like(rows), torch.zeros_like(columns)
            d_bias = -pull.sum()
            for start, stop, s in Sweep(rows, columns):
                s.mul_(factor).add_(shift)
                positive_entries(s, start, offset).fill_(-torch.inf)
                same.fill(s, start, stop, -torch.inf)
                loss += softplus(s, threshold=EXACT).sum()
                if wanted:
                    p = s.sigmoid_()
                    d_bias += p.sum()
                    d_rows[start:stop] = p @ columns
                    d_columns.addmm_(p.t(), rows[start:stop])
            if wanted:
                d_rows -= pull[:, None] * matched
                d_columns[offset : offset + n] -= pull[:, None] * rows
                d_scale = (d_rows * rows).sum()
                d_rows *= factor
                d_columns *= factor
                ctx.save_for_backward(
                    d_rows.to(image.dtype),
                    d_columns.to(text.dtype),
                    d_scale.reshape(scale.shape).to(scale.dtype),
                    d_bias.reshape(bias.shape).to(bias.dtype),
                )
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        image, text, scale, bias = (
            grad.to(d.dtype) * d if need else None
            for d, need in zip(
                ctx.saved_tensors, [ctx.needs_input_grad[k] for k in (0, 1, 4, 5)], strict=True
            )
        )
        return image, text, None, None, scale, bias, None, None
