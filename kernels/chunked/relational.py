"""Implements relational distillation, which fits each row of the student's similarities to the teacher's.

Let p be the softmax of a row of the teacher's similarities, and q the softmax of the student's.
The loss of the row is sum p (log p - log q). Its gradient with respect to the student's similarities is
(q - p) / temperature.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from d2s.kernels.chunked.common import Sweep, full_precision
from d2s.kernels.dtypes import accumulator


def _log_softmax(x: Tensor, scratch: Tensor) -> Tensor:
    """Replaces each row of x by the logarithm of its softmax, in place. Returns x. Overwrites `scratch`."""
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
    """Returns (loss, d_student, d_all) of shapes (), (B, D) and (N, D), in the student's accumulator type.

    d_all is the gradient with respect to `student_all`. A gradient that `need` does not select is empty. See
    `d2s.kernels.functional.relational_distillation`.
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
            # This is KL(teacher || student). A teacher probability that underflows to 0 adds 0.
            loss += log_t.sub_(log_s).mul_(p).sum()
            difference = log_s.exp_().sub_(p)
            if need_student:
                torch.mm(difference, columns, out=d_rows[start:stop])
            if need_all:
                d_columns.addmm_(difference.t(), rows[start:stop])
        return loss.to(out), d_rows.div_(temperature).to(out), d_columns.div_(temperature).to(out)
