"""Computes the gradients of relational distillation, from blocks of the difference of two softmaxes.

d_student = (q - p) @ student_all / temperature and d_all = (q - p)^T @ student / temperature. p is the
softmax of a row of the teacher's similarities, and q the softmax of the student's (see `relational.py`).

`_difference` computes both tiles again by the forward's arithmetic and writes q - p, at most BLOCK_BYTES at a
time. Two matrix products turn q - p into the gradients (2 B N (D + E) + 4 B N D flops). The blocks are about
square, which keeps reads and writes of the gradients few.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2s.kernels.fused.launch import INTERPRETED, cdiv, not_needed, options, tile_constants
from d2s.kernels.fused.spec import KernelSpec
from d2s.kernels.fused.sweep import resident_rows, similarities
from d2s.kernels.fused.tiles import Tile

# The largest size of a block of differences, in bytes and in rows.
BLOCK_BYTES = 64 << 20
BLOCK_ROWS = 4096
# Factor for the differences in fp16, in which small numbers would become 0.
FLOAT16_GAIN = 2.0**15


@triton.jit(do_not_specialize=("n", "start", "stop", "first", "last"))
def _difference(
    student,  # (B, D)
    teacher,  # (B, E)
    student_all,  # (N, D)
    teacher_all,  # (N, E)
    rows,  # (4, B): maximum and sum of the student and of the teacher
    block,  # (stop - start, last - first), gain * (q - p)
    scale,  # log2(e) / temperature
    gain, n, start, stop, first, last,
    WIDTH: tl.constexpr, TEACHER_WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, UPCAST: tl.constexpr, TEACHER_UPCAST: tl.constexpr,
):  # fmt: skip
    """Computes one tile of the block with rows start..stop - 1 and columns first..last - 1."""
    row = start + tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = first + tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inner_row, inner = tl.minimum(row, stop - 1), tl.minimum(column, last - 1)
    student_resident = resident_rows(student, inner_row, WIDTH, DEPTH, UPCAST)
    s = similarities(student_resident, student, inner_row, student_all, inner, WIDTH, DEPTH, UPCAST)
    teacher_resident = resident_rows(teacher, inner_row, TEACHER_WIDTH, DEPTH, TEACHER_UPCAST)
    t = similarities(
        teacher_resident, teacher, inner_row, teacher_all, inner, TEACHER_WIDTH, DEPTH, TEACHER_UPCAST
    )
    at = rows + inner_row
    q = tl.exp2((s - tl.load(at)[:, None]) * scale)
    p = tl.exp2((t - tl.load(at + 2 * n)[:, None]) * scale)
    # The compiler would fuse a plain product with the difference. Then equal numbers would not give 0.
    q = tl.fma(q, (gain / tl.load(at + n))[:, None], 0.0)
    p = tl.fma(p, (gain / tl.load(at + 3 * n))[:, None], 0.0)
    to = block + (row - start).to(tl.int64)[:, None] * (last - first) + (column - first)[None, :]
    inside = (row < stop)[:, None] & (column < last)[None, :]
    tl.store(to, (q - p).to(block.dtype.element_ty), mask=inside)


def pair_constants(tile: Tile, student: Tensor, teacher: Tensor) -> dict[str, object]:
    """Returns the constants of a kernel that computes tiles of both the student and the teacher."""
    return {
        **tile_constants(tile, student.shape[1], INTERPRETED and student.element_size() == 2),
        "TEACHER_WIDTH": teacher.shape[1],
        "TEACHER_UPCAST": INTERPRETED and teacher.element_size() == 2,
    }


def spec_constants(tile: Tile, width: int, half: bool) -> dict[str, object]:
    """Returns `pair_constants` for a KernelSpec, in which the teacher has the student's width."""
    return {**tile_constants(tile, width), "TEACHER_WIDTH": width, "TEACHER_UPCAST": False}


def gradients(
    sides: tuple[Tensor, ...], tile: Tile, rows: Tensor, temperature: float, need: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """Returns (d_student, d_all), of shapes (B, D) and (N, D), in float32.

    A gradient that `need` does not select is empty. `sides` holds student, teacher, student_all, teacher_all.
    `_finish` in `relational.py` writes `rows`, of shape (4, B).
    """
    student, teacher, student_all, _ = sides
    n, m = student.shape[0], student_all.shape[0]
    # The interpreter has no product of 16-bit matrices into float32.
    dtype = student.dtype if student.device.type == "cuda" else torch.float32
    x, y = student.to(dtype), student_all.to(dtype)
    gain = FLOAT16_GAIN if dtype == torch.float16 else 1.0
    height = min(n, BLOCK_ROWS)
    width = min(m, max(1, BLOCK_BYTES // (height * x.element_size())))
    memory = x.new_empty(height * width)
    d_student = torch.zeros_like(x, dtype=torch.float32) if need[0] else not_needed(rows)
    d_all = torch.zeros_like(y, dtype=torch.float32) if need[1] else not_needed(rows)
    scale, factor = math.log2(math.e) / temperature, 1 / (temperature * gain)
    constants = pair_constants(tile, student, teacher) | options(tile)
    with torch.autocast(device_type=x.device.type, enabled=False):
        for start in range(0, n, height):
            stop = min(start + height, n)
            for first in range(0, m, width):
                last = min(first + width, m)
                block = memory[: (stop - start) * (last - first)].view(stop - start, last - first)
                grid = cdiv(last - first, tile.columns), cdiv(stop - start, tile.rows)
                _difference[grid](*sides, rows, block, scale, gain, n, start, stop, first, last, **constants)
                if need[0]:
                    _add_product(d_student[start:stop], block, y[first:last], factor)
                if need[1]:
                    _add_product(d_all[first:last], block.t(), x[start:stop], factor)
    return d_student, d_all


def _add_product(out: Tensor, a: Tensor, b: Tensor, factor: float) -> None:
    """Adds factor * a @ b to the float32 tensor `out`. The product is accumulated in float32."""
    if a.dtype == out.dtype:
        out.addmm_(a, b, alpha=factor)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, alpha=factor, out=out)


SPECS = [
    KernelSpec(
        name="relational_difference",
        kernel=_difference,
        pointers={
            **dict.fromkeys(("student", "teacher", "student_all", "teacher_all", "block"), "*x"), "rows": "*fp32"
        },
        scalars={"scale": "fp32", "gain": "fp32"},
        constants=spec_constants,
        row="relational_statistics",
    ),
]  # fmt: skip
