"""Implements pointwise distillation: reads student and teacher once to compute loss and gradient.

s and t are the rows, normalised if requested, and g is the gradient with respect to s. For "cosine",
the loss is 1 - s.t and g = -t. For "l1", the loss is sum |s - t| and g = sign(s - t). For "l2", the loss is
sum (s - t)^2 and g = 2 (s - t). Normalisation turns g into (g - s (s.g)) / |row|.

A program holds full rows. In float32 it reads 8 bytes per entry and writes 4. Only the partial losses, one
number per program, are added up across programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2s.kernels.fused.launch import cdiv, not_needed, on_device_of, power_of_two, total
from d2s.kernels.fused.spec import KernelSpec
from d2s.kernels.fused.tiles import Tile

KINDS = {"cosine": 0, "l1": 1, "l2": 2}
# Entries of each side that a program holds, approximately.
ENTRIES = 2048


@triton.jit
def _inverse_norm(x):
    """Returns a column with 1 / |row| for each row of x: 0 for a zero row, NaN if the norm overflows."""
    norm = tl.sqrt(tl.sum(x * x, 1, keep_dims=True))
    usual = (norm > 0) & (norm < float("inf"))
    return tl.where(usual, 1.0 / tl.where(usual, norm, 1.0), tl.where(norm == 0, 0.0, float("nan")))


@triton.jit(do_not_specialize=("n",))
def _pointwise(
    student,  # (B, D), with strides
    teacher,  # (B, D), with strides
    loss,  # (programs,)
    d_student,  # (B, D)
    n, student_row, student_step, teacher_row, teacher_step,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, NORMALIZE: tl.constexpr,
    GRADIENT: tl.constexpr,
):  # fmt: skip
    """Computes the loss and gradient of ROWS rows. KIND is a value of KINDS. Rows beyond `n` add 0."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    k = tl.arange(0, BLOCK)[None, :]
    inside = (row < n) & (k < WIDTH)
    s = tl.load(student + row * student_row + k * student_step, mask=inside, other=0.0).to(tl.float32)
    t = tl.load(teacher + row * teacher_row + k * teacher_step, mask=inside, other=0.0).to(tl.float32)
    if NORMALIZE:
        inverse = _inverse_norm(s)
        # The compiler would fuse a plain product with the difference below. Then the difference would not be
        # exactly 0 for equal rows.
        s = tl.fma(s, inverse, 0.0)
        t = tl.fma(t, _inverse_norm(t), 0.0)
    difference = s - t
    if KIND == 0:
        cost = tl.where(row < n, 1.0 - tl.sum(s * t, 1, keep_dims=True), 0.0)
        g = -t
    elif KIND == 1:
        cost = tl.sum(tl.abs(difference), 1, keep_dims=True)
        g = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, difference))
    else:
        cost = tl.sum(difference * difference, 1, keep_dims=True)
        g = 2.0 * difference
    tl.store(loss + tl.program_id(0), tl.sum(tl.sum(cost, 1), 0))
    if GRADIENT:
        if NORMALIZE:
            g = (g - s * tl.sum(s * g, 1, keep_dims=True)) * inverse
        tl.store(d_student + row * WIDTH + k, g, mask=inside)


def pointwise_forward(
    student: Tensor, teacher: Tensor, kind: str, normalize: bool, need_student: bool
) -> tuple[Tensor, Tensor]:
    """Returns (loss, d_student) in float32. See `d2s.kernels.functional.pointwise_distillation`."""
    n, width = student.shape
    block = power_of_two(width)
    rows = max(1, ENTRIES // block)
    programs = cdiv(n, rows)
    loss = student.new_empty(programs, dtype=torch.float32)
    d_student = not_needed(loss)
    if need_student:
        d_student = student.new_empty(n, width, dtype=torch.float32)
    with on_device_of(student):
        _pointwise[(programs,)](
            student, teacher, loss, d_student, n, *student.stride(), *teacher.stride(),
            WIDTH=width, ROWS=rows, BLOCK=block, KIND=KINDS[kind], NORMALIZE=normalize, GRADIENT=need_student,
            num_warps=_warps(block),
        )  # fmt: skip
    return total(loss), d_student


def _warps(block: int) -> int:
    """Returns the number of warps for a program that pads rows to `block` entries."""
    return min(16, max(4, block // 1024))


def _spec(kind: str) -> KernelSpec:
    def constants(tile: Tile, width: int, half: bool) -> dict[str, object]:
        block = power_of_two(width)
        return {
            "WIDTH": width, "ROWS": max(1, ENTRIES // block), "BLOCK": block, "KIND": KINDS[kind],
            "NORMALIZE": True, "GRADIENT": True, "student_step": 1, "teacher_step": 1,
        }  # fmt: skip

    return KernelSpec(
        name=f"pointwise_{kind}",
        kernel=_pointwise,
        pointers={"student": "*x", "teacher": "*x", "loss": "*fp32", "d_student": "*fp32"},
        scalars=dict.fromkeys(("student_row", "teacher_row"), "i32"),
        constants=constants,
        dots=False,
        options=lambda tile, width, half: {"num_warps": _warps(power_of_two(width))},
    )


SPECS = [_spec(kind) for kind in KINDS]
