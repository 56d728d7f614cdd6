"""Pointwise distillation: each student row follows its own teacher row."""

import torch
from torch import Tensor

from d2s.kernels.chunked.common import upcast


def _inverse_norm(x: Tensor) -> Tensor:
    """1 / |row| of x (B, D), (B, 1); 0 for a row of zeros, which stays zero and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return torch.where(norm > 0, 1 / norm, 0)


def pointwise_forward(
    student: Tensor, teacher: Tensor, kind: str, normalize: bool, need_student: bool
) -> tuple[Tensor, Tensor]:
    """(loss (), d_student (B, D)), both acc. As in `d2s.kernels.functional.pointwise_distillation`."""
    s = upcast(student)
    t = upcast(teacher).to(s.dtype)
    if normalize:
        inverse = _inverse_norm(s)
        s, t = s * inverse, t * _inverse_norm(t)
    if kind == "cosine":
        loss = (1 - (s * t).sum(1)).sum()
    else:
        loss = (s - t).abs().sum() if kind == "l1" else (s - t).square().sum()
    if not need_student:
        return loss, s.new_empty(0)
    if kind == "cosine":
        g = -t
    else:
        g = (s - t).sign() if kind == "l1" else 2 * (s - t)
    if normalize:
        g = (g - s * (s * g).sum(1, keepdim=True)) * inverse
    return loss, g
