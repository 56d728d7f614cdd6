"""Pointwise distillation: each student row follows its own teacher row."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from d2s.kernels.chunked.common import upcast


def pointwise_distillation(student: Tensor, teacher: Tensor, *, kind: str, normalize: bool) -> Tensor:
    """See `d2s.kernels.functional.pointwise_distillation`."""
    return _Pointwise.apply(student, teacher, kind, normalize)


def _inverse_norm(x: Tensor) -> Tensor:
    """1 / |row| of x (B, D), (B, 1); 0 for a row of zeros, which stays zero and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return torch.where(norm > 0, 1 / norm, 0)


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, kind, normalize):
        s, t = upcast(student), upcast(teacher).to(upcast(student).dtype)
        if normalize:
            s, t = s * _inverse_norm(s), t * _inverse_norm(t)
        ctx.save_for_backward(student, teacher)
        ctx.kind, ctx.normalize = kind, normalize
        if kind == "cosine":
            return (1 - (s * t).sum(1)).sum()
        return (s - t).abs().sum() if kind == "l1" else (s - t).square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        student, teacher = ctx.saved_tensors
        s, t = upcast(student), upcast(teacher).to(upcast(student).dtype)
        if ctx.normalize:
            inverse = _inverse_norm(s)
            s, t = s * inverse, t * _inverse_norm(t)
        if ctx.kind == "cosine":
            g = -t
        else:
            g = (s - t).sign() if ctx.kind == "l1" else 2 * (s - t)
        if ctx.normalize:
            g = (g - s * (s * g).sum(1, keepdim=True)) * inverse
        return (grad * g).to(student.dtype), None, None, None
