"""Implements pointwise distillation, which compares each student row with the same teacher row."""

import torch
from torch import Tensor

from d2s.kernels.dtypes import accumulator

# Entries in a block of rows. Blocks are small, so that intermediate results stay in the cache.
BLOCK_ENTRIES = 1 << 17


def _inverse_norm(x: Tensor) -> Tensor:
    """Returns a column with 1 / |row| for each row of x: 0 for a zero row, NaN if the norm overflows."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return torch.where(norm == 0, 0, torch.where(norm < torch.inf, 1 / norm, torch.nan))


def pointwise_forward(
    student: Tensor, teacher: Tensor, kind: str, normalize: bool, need_student: bool
) -> tuple[Tensor, Tensor]:
    """Returns the loss and d_student. See `d2s.kernels.functional.pointwise_distillation`.

    Both have the accumulator type. The loss has shape () and d_student (B, D). If `need_student` is false,
    d_student is empty.
    """
    b, d = student.shape
    acc = accumulator(student.dtype)
    rows = max(1, BLOCK_ENTRIES // d)
    losses = student.new_empty(-(-b // rows), dtype=acc)
    d_student = student.new_empty((b, d) if need_student else 0, dtype=acc)
    for block, start in enumerate(range(0, b, rows)):
        s, t = (x[start : start + rows].to(acc) for x in (student, teacher))
        if normalize:
            inverse = _inverse_norm(s)
            s, t = s * inverse, t * _inverse_norm(t)
        losses[block], g = _block(s, t, kind, need_student)
        if need_student:
            if normalize:
                # The Jacobian of s / |s| removes the part of the gradient that only changes the length.
                g = (g - s * (s * g).sum(1, keepdim=True)) * inverse
            d_student[start : start + rows] = g
    return losses.sum(), d_student


def _block(s: Tensor, t: Tensor, kind: str, need_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Returns the summed loss of student rows `s` and teacher rows `t`, and d loss / d s (maybe None)."""
    if kind == "cosine":
        return (1 - (s * t).sum(1)).sum(), -t if need_gradient else None
    difference = s - t
    if kind == "l1":
        return difference.abs().sum(), difference.sign() if need_gradient else None
    return difference.square().sum(), 2 * difference if need_gradient else None
