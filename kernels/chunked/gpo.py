"""GPO pooling: every channel sorted by itself along the tokens, then a weighted sum."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from d2s.kernels.chunked.common import upcast


def gpo_pool(features: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """See `d2s.kernels.functional.gpo_pool`."""
    return _GPO.apply(features, weights, mask)


class _GPO(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, weights, mask):
        x, w = upcast(features), upcast(weights).to(upcast(features).dtype)
        real = torch.arange(mask.shape[1], device=mask.device) < mask.sum(1, keepdim=True)
        w = torch.where(real, w, 0)
        x = x.masked_fill(~mask[:, :, None], -torch.inf).transpose(1, 2)
        value, order = torch.sort(x, dim=2, descending=True, stable=True)
        value = torch.where(real[:, None], value, 0)
        ctx.save_for_backward(value, order, w, real)
        ctx.types = (features.dtype, weights.dtype)
        return (value * w[:, None]).sum(2).to(features.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        value, order, w, real = ctx.saved_tensors
        grad = grad.to(value.dtype)
        d_features = d_weights = None
        if ctx.needs_input_grad[0]:
            spread = grad[:, :, None] * w[:, None]
            d_features = torch.empty_like(value).scatter_(2, order, spread)
            d_features = d_features.transpose(1, 2).to(ctx.types[0])
        if ctx.needs_input_grad[1]:
            d_weights = (grad[:, :, None] * value).sum(1)
            d_weights = torch.where(real, d_weights, 0).to(ctx.types[1])
        return d_features, d_weights, None
