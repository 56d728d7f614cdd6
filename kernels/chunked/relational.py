"""Relational distillation: the student's similarity rows follow the teacher's.

With the softmax p of the teacher's and q of the student's row the loss is sum p (log p - log q), and its gradient
by the student's similarities is (q - p) / temperature.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from d2s.kernels.chunked.common import Sweep, full_precision
from d2s.kernels.dtypes import accumulator


def _log_softmax(x: Tensor, scratch: Tensor) -> Tensor:
    """The logarithm of the softmax of each row of x (r, N), in place."""
    x.sub_(x.amax(1, keepdim=True))
    return x.sub_(torch.exp(x, out=scratch).sum(1, keepdim=True).log_())


def relational_forward(
    student: Tensor,
    teacher: Tensor,
    student_all: Tensor,
    teacher_all: Tensor,
    temperature: float,
    need: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss (), d_student (B, D), d_all (N, D)), all in the student's accumulator type; need: which gradients.

    See `d2s.kernels.functional.relational_distillation`. Computed in the wider type of student and student_all.
    """
    need_student, need_all = need
    out = accumulator(student.dtype)
    wide = accumulator(torch.promote_types(student.dtype, student_all.dtype))
    with full_precision(student.device):
        rows, columns = student.to(wide).contiguous(), student_all.to(wide).contiguous()
        loss = rows.new_zeros(())
        d_rows = torch.empty_like(rows) if need_student else rows.new_empty(0)
        d_columns = torch.zeros_like(columns) if need_all else rows.new_empty(0)
        teacher_sweep = Sweep(teacher.to(wide).contiguous(), teacher_all.to(wide).contiguous())
        scratch = torch.empty_like(teacher_sweep.buffer)
        for (start, stop, s), (_, _, t) in zip(Sweep(rows, columns), teacher_sweep, strict=True):
            p = scratch[: stop - start]
            log_s = _log_softmax(s.div_(temperature), p)
            log_t = _log_softmax(t.div_(temperature), p)
            torch.exp(log_t, out=p)
            # KL(teacher || student); a probability that underflows to 0 contributes 0.
            loss += log_t.sub_(log_s).mul_(p).sum()
            difference = log_s.exp_().sub_(p)
            if need_student:
                torch.mm(difference, columns, out=d_rows[start:stop])
            if need_all:
                d_columns.addmm_(difference.t(), rows[start:stop])
        return loss.to(out), d_rows.div_(temperature).to(out), d_columns.div_(temperature).to(out)
