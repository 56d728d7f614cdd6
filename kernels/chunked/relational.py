"""Relational distillation: the student's similarity rows follow the teacher's."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from d2s.kernels.chunked.common import Sweep, full_precision, upcast


def relational_distillation(
    student: Tensor, teacher: Tensor, student_all: Tensor, teacher_all: Tensor, *, temperature: float
) -> Tensor:
    """See `d2s.kernels.functional.relational_distillation`."""
    wanted = torch.is_grad_enabled() and (student.requires_grad or student_all.requires_grad)
    return _Relational.apply(student, teacher, student_all, teacher_all, temperature, wanted)


class _Relational(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, student_all, teacher_all, temperature, wanted):
        with full_precision(student.device):
            rows, columns = upcast(student), upcast(student_all)
            loss = rows.new_zeros(())
            d_rows, d_columns = torch.empty_like(rows), torch.zeros_like(columns)
            teacher_sweep = Sweep(upcast(teacher).to(rows.dtype), upcast(teacher_all).to(rows.dtype))
            for (start, stop, s), (_, _, t) in zip(Sweep(rows, columns), teacher_sweep, strict=True):
                log_s = torch.log_softmax(s.div_(temperature), 1)
                log_t = torch.log_softmax(t.div_(temperature), 1)
                p = log_t.exp()
                # KL(teacher || student); a probability that underflows to 0 contributes 0.
                loss += (p * (log_t - log_s)).sum()
                if wanted:
                    difference = log_s.exp_().sub_(p)
                    d_rows[start:stop] = difference @ columns
                    d_columns.addmm_(difference.t(), rows[start:stop])
            if wanted:
                ctx.save_for_backward(d_rows.div_(temperature), d_columns.div_(temperature))
        ctx.types = (student.dtype, student_all.dtype)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        d_rows, d_columns = ctx.saved_tensors
        student = (grad * d_rows).to(ctx.types[0]) if ctx.needs_input_grad[0] else None
        student_all = (grad * d_columns).to(ctx.types[1]) if ctx.needs_input_grad[2] else None
        return student, None, student_all, None, None, None
