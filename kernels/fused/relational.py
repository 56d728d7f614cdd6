"""Implements relational distillation. One sweep computes the loss. A second one computes the gradients.

Let s and t be the similarities of the student and the teacher, divided by the temperature. In each row,
q = softmax(s) and p = softmax(t). loss = sum over rows of sum p (log p - log q). d loss / d s = q - p.

`_statistics` computes the student's and the teacher's tile of the same pairs (2 B N (D + E) flops). For each
row, it keeps the running maximum and sum of both softmaxes, and the cross term sum e^t (t - s). A program
takes a tile of rows and a range of columns. `_finish` merges the ranges in ascending order.

Exponents are in base 2. At a temperature of 0.01, careless rounding would cost every probability several
bits. So the maximum of a row (in units of similarity) and its sum are stored apart, not as one logarithm. The
maximum is subtracted before the division by the temperature.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2s.kernels.fused.launch import PROGRAMS, cdiv, not_needed, on_device_of, options, total
from d2s.kernels.fused.relational_gradient import gradients, pair_constants, spec_constants
from d2s.kernels.fused.spec import KernelSpec
from d2s.kernels.fused.sweep import resident_rows, similarities
from d2s.kernels.fused.tiles import tile_for

# Rows that each program of `_finish` merges.
MERGED = 256


@triton.jit(do_not_specialize=("n", "m", "tiles"))
def _statistics(
    student,  # (B, D)
    teacher,  # (B, E)
    student_all,  # (N, D)
    teacher_all,  # (N, E)
    parts,  # (splits, 5, B): maximum and sum of the student, of the teacher, and the cross term
    scale,  # log2(e) / temperature
    n, m, tiles,
    WIDTH: tl.constexpr, TEACHER_WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, UPCAST: tl.constexpr, TEACHER_UPCAST: tl.constexpr,
):  # fmt: skip
    """Computes maxima, sums and cross terms for ROWS rows and a range of `tiles` tiles of columns."""
    block, split = tl.program_id(0), tl.program_id(1)
    row = block * ROWS + tl.arange(0, ROWS)
    inner_row = tl.minimum(row, n - 1)
    student_resident = resident_rows(student, inner_row, WIDTH, DEPTH, UPCAST)
    teacher_resident = resident_rows(teacher, inner_row, TEACHER_WIDTH, DEPTH, TEACHER_UPCAST)
    s_top = tl.full((ROWS,), float("-inf"), tl.float32)
    t_top = tl.full((ROWS,), float("-inf"), tl.float32)
    s_sum = tl.zeros((ROWS,), tl.float32)
    t_sum = tl.zeros((ROWS,), tl.float32)
    cross = tl.zeros((ROWS,), tl.float32)
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(m, COLUMNS))):
        column = tile * COLUMNS + tl.arange(0, COLUMNS)
        inner = tl.minimum(column, m - 1)
        s = similarities(student_resident, student, inner_row, student_all, inner, WIDTH, DEPTH, UPCAST)
        t = similarities(
            teacher_resident, teacher, inner_row, teacher_all, inner, TEACHER_WIDTH, DEPTH, TEACHER_UPCAST
        )
        inside = (column < m)[None, :]
        difference = t - s
        s = tl.where(inside, s, float("-inf"))
        t = tl.where(inside, t, float("-inf"))
        s_new = tl.maximum(s_top, tl.max(s, 1))
        t_new = tl.maximum(t_top, tl.max(t, 1))
        s_sum = s_sum * tl.exp2((s_top - s_new) * scale) + tl.sum(tl.exp2((s - s_new[:, None]) * scale), 1)
        p = tl.exp2((t - t_new[:, None]) * scale)
        fade = tl.exp2((t_top - t_new) * scale)
        t_sum = t_sum * fade + tl.sum(p, 1)
        cross = cross * fade + tl.sum(p * difference, 1)
        s_top = s_new
        t_top = t_new
    part = parts + split.to(tl.int64) * 5 * n + row
    tl.store(part, s_top, mask=row < n)
    tl.store(part + n, s_sum, mask=row < n)
    tl.store(part + 2 * n, t_top, mask=row < n)
    tl.store(part + 3 * n, t_sum, mask=row < n)
    tl.store(part + 4 * n, cross, mask=row < n)


@triton.jit(do_not_specialize=("n", "splits"))
def _finish(
    parts,  # (splits, 5, B)
    rows,  # (4, B): maximum and sum of the student and of the teacher
    loss,  # (programs,)
    scale, n, splits,
    MERGED: tl.constexpr,
):  # fmt: skip
    """Merges the `parts` of all column ranges for MERGED rows, and adds up the losses of these rows."""
    row = tl.program_id(0) * MERGED + tl.arange(0, MERGED)
    inside = row < n
    at = parts + tl.minimum(row, n - 1)
    s_top = tl.load(at)
    s_sum = tl.load(at + n)
    t_top = tl.load(at + 2 * n)
    t_sum = tl.load(at + 3 * n)
    cross = tl.load(at + 4 * n)
    for _ in range(1, splits):
        at += 5 * n
        top = tl.load(at)
        s_new = tl.maximum(s_top, top)
        old, new = tl.exp2((s_top - s_new) * scale), tl.exp2((top - s_new) * scale)
        s_sum = s_sum * old + tl.load(at + n) * new
        s_top = s_new
        top = tl.load(at + 2 * n)
        t_new = tl.maximum(t_top, top)
        old, new = tl.exp2((t_top - t_new) * scale), tl.exp2((top - t_new) * scale)
        t_sum = t_sum * old + tl.load(at + 3 * n) * new
        cross = cross * old + tl.load(at + 4 * n) * new
        t_top = t_new
    tl.store(rows + row, s_top, mask=inside)
    tl.store(rows + n + row, s_sum, mask=inside)
    tl.store(rows + 2 * n + row, t_top, mask=inside)
    tl.store(rows + 3 * n + row, t_sum, mask=inside)
    # Subtract maxima and divide sums. The difference of two large logarithms would lose digits.
    value = (cross / t_sum + (s_top - t_top)) * scale + tl.log2(s_sum / t_sum)
    tl.store(loss + tl.program_id(0), tl.sum(tl.where(inside, value, 0.0), 0) * 0.6931471805599453)


def relational_forward(
    student: Tensor,
    teacher: Tensor,
    student_all: Tensor,
    teacher_all: Tensor,
    temperature: float,
    need: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (loss, d_student, d_all) in float32. d_all is the gradient with respect to `student_all`."""
    student, student_all = _alike(student, student_all)
    teacher, teacher_all = _alike(teacher, teacher_all)
    sides = student, teacher, student_all, teacher_all
    n, m = student.shape[0], student_all.shape[0]
    scale = math.log2(math.e) / temperature
    with on_device_of(student):
        tile = tile_for("relational_statistics", student)
        constants = pair_constants(tile, student, teacher)
        blocks, columns = cdiv(n, tile.rows), cdiv(m, tile.columns)
        tiles = cdiv(columns, min(columns, max(1, PROGRAMS // blocks)))
        splits = cdiv(columns, tiles)
        parts = student.new_empty(splits, 5, n, dtype=torch.float32)
        _statistics[blocks, splits](*sides, parts, scale, n, m, tiles, **constants, **options(tile))
        rows, loss = parts.new_empty(4, n), parts.new_empty(cdiv(n, MERGED))
        _finish[(loss.shape[0],)](parts, rows, loss, scale, n, splits, MERGED=MERGED, num_warps=4)
        d_student, d_all = not_needed(parts), not_needed(parts)
        if any(need):
            d_student, d_all = gradients(sides, tile, rows, temperature, need)
    return total(loss), d_student, d_all


def _alike(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Returns x and y as contiguous tensors of the same type, which has at most 32 bits."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    dtype = torch.float32 if dtype == torch.float64 else dtype
    return x.to(dtype).contiguous(), y.to(dtype).contiguous()


SPECS = [
    KernelSpec(
        name="relational_statistics",
        kernel=_statistics,
        pointers={
            **dict.fromkeys(("student", "teacher", "student_all", "teacher_all"), "*x"),
            "parts": "*fp32",
        },
        scalars={"scale": "fp32"},
        constants=spec_constants,
    ),
    KernelSpec(
        name="relational_finish",
        kernel=_finish,
        pointers=dict.fromkeys(("parts", "rows", "loss"), "*fp32"),
        scalars={"scale": "fp32"},
        constants=lambda tile, width, half: {"MERGED": MERGED},
        dots=False,
        widths=(64,),
        dtypes=("fp32",),
        options=lambda tile, width, half: {"num_warps": 4},
    ),
]
