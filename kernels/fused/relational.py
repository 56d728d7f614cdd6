"""Relational distillation: one sweep for the loss, another in blocks for the gradients.

`_statistics` holds the student's and the teacher's tile of the same pairs (2 n M (D + E) flops): per row the
maximum and the sum of both softmaxes, and the cross term sum e^t (t - s), all online. A program owns a block of
rows and a range of columns; `_finish` merges the ranges in ascending order. `_difference` makes both tiles once
more by the same arithmetic and writes softmax(s) - softmax(t) of at most BLOCK_BYTES at a time, which two matrix
products turn into both gradients (2 n M (D + E) + 4 n M D flops). The blocks are about square, so that the
gradients are read and written as rarely as possible: n M / side * 16 D bytes in all.

Exponents are in base 2. A row's maximum, in units of the similarities, and its sum are kept apart instead of as
one logarithm, and the maximum is subtracted before the temperature divides: else a temperature of 0.01 would cost
every probability several bits.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2s.kernels.fused.launch import INTERPRETED, PROGRAMS, cdiv, nothing, on, options, total
from d2s.kernels.fused.spec import KernelSpec
from d2s.kernels.fused.sweep import kept_rows, similarities
from d2s.kernels.fused.tiles import Tile, tile_for

# Of the differences that exist at a time, and the most rows they belong to.
BLOCK_BYTES = 64 << 20
BLOCK_ROWS = 4096
# Rows that a program of `_finish` owns.
MERGED = 256
# Differences are multiplied by this where they are kept in float16, whose small numbers are few.
FLOAT16_GAIN = 2.0**15

SIZES = ("n", "m", "tiles")


@triton.jit(do_not_specialize=SIZES)
def _statistics(
    student,
    teacher,
    student_all,
    teacher_all,
    parts,
    scale,
    n,
    m,
    tiles,
    WIDTH: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
    TEACHER_UPCAST: tl.constexpr,
):
    """parts: (splits, 5, n) of maximum and sum of the student, of the teacher, and the cross term; scale > 0."""
    block, split = tl.program_id(0), tl.program_id(1)
    row = block * ROWS + tl.arange(0, ROWS)
    inner_row = tl.minimum(row, n - 1)
    student_kept = kept_rows(student, inner_row, WIDTH, DEPTH, UPCAST)
    teacher_kept = kept_rows(teacher, inner_row, TEACHER_WIDTH, DEPTH, TEACHER_UPCAST)
    s_top = tl.full((ROWS,), float("-inf"), tl.float32)
    t_top = tl.full((ROWS,), float("-inf"), tl.float32)
    s_sum = tl.zeros((ROWS,), tl.float32)
    t_sum = tl.zeros((ROWS,), tl.float32)
    cross = tl.zeros((ROWS,), tl.float32)
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(m, COLUMNS))):
        column = tile * COLUMNS + tl.arange(0, COLUMNS)
        inner = tl.minimum(column, m - 1)
        s = similarities(student_kept, student, inner_row, student_all, inner, WIDTH, DEPTH, UPCAST)
        t = similarities(
            teacher_kept, teacher, inner_row, teacher_all, inner, TEACHER_WIDTH, DEPTH, TEACHER_UPCAST
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
def _finish(parts, rows, loss, scale, n, splits, MERGED: tl.constexpr):
    """rows: (4, n) of the maxima and sums over all ranges; loss: the sum over this program's rows."""
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
    # Maxima against maxima and sums against sums: the difference of two large logarithms would keep less.
    value = (cross / t_sum + (s_top - t_top)) * scale + tl.log2(s_sum / t_sum)
    tl.store(loss + tl.program_id(0), tl.sum(tl.where(inside, value, 0.0), 0) * 0.6931471805599453)


@triton.jit(do_not_specialize=("n", "start", "stop", "first", "last"))
def _difference(
    student,
    teacher,
    student_all,
    teacher_all,
    rows,
    block,
    scale,
    gain,
    n,
    start,
    stop,
    first,
    last,
    WIDTH: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
    TEACHER_UPCAST: tl.constexpr,
):
    """block (stop - start, last - first): gain * (softmax(s) - softmax(t)) of those rows and columns."""
    row = start + tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = first + tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inner_row, inner = tl.minimum(row, stop - 1), tl.minimum(column, last - 1)
    student_kept = kept_rows(student, inner_row, WIDTH, DEPTH, UPCAST)
    s = similarities(student_kept, student, inner_row, student_all, inner, WIDTH, DEPTH, UPCAST)
    teacher_kept = kept_rows(teacher, inner_row, TEACHER_WIDTH, DEPTH, TEACHER_UPCAST)
    t = similarities(
        teacher_kept, teacher, inner_row, teacher_all, inner, TEACHER_WIDTH, DEPTH, TEACHER_UPCAST
    )
    at = rows + inner_row
    q = tl.exp2((s - tl.load(at)[:, None]) * scale)
    p = tl.exp2((t - tl.load(at + 2 * n)[:, None]) * scale)
    # As products they would be contracted with the difference, and equal ones would not give 0 but p's rounding.
    q = tl.fma(q, (gain / tl.load(at + n))[:, None], 0.0)
    p = tl.fma(p, (gain / tl.load(at + 3 * n))[:, None], 0.0)
    to = block + (row - start).to(tl.int64)[:, None] * (last - first) + (column - first)[None, :]
    inside = (row < stop)[:, None] & (column < last)[None, :]
    tl.store(to, (q - p).to(block.dtype.element_ty), mask=inside)


def relational_forward(
    student: Tensor,
    teacher: Tensor,
    student_all: Tensor,
    teacher_all: Tensor,
    temperature: float,
    need_student: bool,
    need_all: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss (), d_student (n, D), d_all (M, D)) in float32; see `d2s.kernels.functional.relational_distillation`.

    What is not needed comes back without entries.
    """
    sides = *_alike(student, student_all), *_alike(teacher, teacher_all)
    student, student_all, teacher, teacher_all = sides
    n, m = student.shape[0], student_all.shape[0]
    scale = math.log2(math.e) / temperature
    with on(student):
        tile = tile_for("relational_statistics", student)
        blocks, columns = cdiv(n, tile.rows), cdiv(m, tile.columns)
        tiles = cdiv(columns, min(columns, max(1, PROGRAMS // blocks)))
        splits = cdiv(columns, tiles)
        parts = student.new_empty(splits, 5, n, dtype=torch.float32)
        _statistics[blocks, splits](
            student, teacher, student_all, teacher_all, parts, scale, n, m, tiles,
            **_constants(tile, student, teacher), **options(tile),
        )  # fmt: skip
        rows, loss = parts.new_empty(4, n), parts.new_empty(cdiv(n, MERGED))
        _finish[(loss.shape[0],)](parts, rows, loss, scale, n, splits, MERGED=MERGED, num_warps=4)
        d_student, d_all = nothing(parts), nothing(parts)
        if need_student or need_all:
            d_student, d_all = _gradients(sides, tile, rows, temperature, need_student, need_all)
    return total(loss), d_student, d_all


def _alike(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both contiguous and in one type of at most 32 bits."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    dtype = torch.float32 if dtype == torch.float64 else dtype
    return x.to(dtype).contiguous(), y.to(dtype).contiguous()


def _constants(tile: Tile, student: Tensor, teacher: Tensor) -> dict[str, object]:
    return {
        "WIDTH": student.shape[1],
        "TEACHER_WIDTH": teacher.shape[1],
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": tile.depth,
        "UPCAST": INTERPRETED and student.element_size() == 2,
        "TEACHER_UPCAST": INTERPRETED and teacher.element_size() == 2,
    }


def _gradients(
    sides: tuple[Tensor, ...],
    tile: Tile,
    rows: Tensor,
    temperature: float,
    need_student: bool,
    need_all: bool,
) -> tuple[Tensor, Tensor]:
    """(d_student, d_all), float32: difference / temperature @ student_all, and its transpose @ student."""
    student, student_all, teacher, teacher_all = sides
    n, m = student.shape[0], student_all.shape[0]
    # The interpreter has no product of 16-bit matrices into float32.
    dtype = student.dtype if student.device.type == "cuda" else torch.float32
    x, y = student.to(dtype), student_all.to(dtype)
    gain = FLOAT16_GAIN if dtype == torch.float16 else 1.0
    high = min(n, BLOCK_ROWS)
    wide = min(m, max(1, BLOCK_BYTES // (high * x.element_size())))
    memory = x.new_empty(high * wide)
    d_student = torch.zeros_like(x, dtype=torch.float32) if need_student else nothing(rows)
    d_all = torch.zeros_like(y, dtype=torch.float32) if need_all else nothing(rows)
    scale, factor = math.log2(math.e) / temperature, 1 / (temperature * gain)
    constants = _constants(tile, student, teacher) | options(tile)
    with torch.autocast(device_type=x.device.type, enabled=False):
        for start in range(0, n, high):
            stop = min(start + high, n)
            for first in range(0, m, wide):
                last = min(first + wide, m)
                block = memory[: (stop - start) * (last - first)].view(stop - start, last - first)
                grid = cdiv(last - first, tile.columns), cdiv(stop - start, tile.rows)
                _difference[grid](
                    student, teacher, student_all, teacher_all, rows, block, scale, gain,
                    n, start, stop, first, last, **constants,
                )  # fmt: skip
                if need_student:
                    _add_product(d_student[start:stop], block, y[first:last], factor)
                if need_all:
                    _add_product(d_all[first:last], block.t(), x[start:stop], factor)
    return d_student, d_all


def _add_product(to: Tensor, a: Tensor, b: Tensor, factor: float) -> None:
    """to += factor * a @ b, in float32 throughout."""
    if a.dtype == to.dtype:
        to.addmm_(a, b, alpha=factor)
    else:
        torch.addmm(to, a, b, out_dtype=to.dtype, alpha=factor, out=to)


def _spec_constants(tile: Tile, width: int, half: bool) -> dict[str, object]:
    return {
        "WIDTH": width,
        "TEACHER_WIDTH": width,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": tile.depth,
        "UPCAST": False,
        "TEACHER_UPCAST": False,
    }


_SIDES = dict.fromkeys(("student", "teacher", "student_all", "teacher_all"), "*x")
SPECS = [
    KernelSpec(
        name="relational_statistics",
        kernel=_statistics,
        pointers={**_SIDES, "parts": "*fp32"},
        scalars={"scale": "fp32", **dict.fromkeys(SIZES, "i32")},
        constants=_spec_constants,
        unaligned=frozenset(SIZES),
    ),
    KernelSpec(
        name="relational_finish",
        kernel=_finish,
        pointers=dict.fromkeys(("parts", "rows", "loss"), "*fp32"),
        scalars={"scale": "fp32", "n": "i32", "splits": "i32"},
        constants=lambda tile, width, half: {"MERGED": MERGED},
        unaligned=frozenset({"n", "splits"}),
        dots=False,
        widths=(64,),
        dtypes=("fp32",),
        options=lambda tile, width, half: {"num_warps": 4},
    ),
    KernelSpec(
        name="relational_difference",
        kernel=_difference,
        pointers={**_SIDES, "rows": "*fp32", "block": "*x"},
        scalars={
            "scale": "fp32", "gain": "fp32", **dict.fromkeys(("n", "start", "stop", "first", "last"), "i32")
        },
        constants=_spec_constants,
        unaligned=frozenset({"n", "start", "stop", "first", "last"}),
        row="relational_statistics",
    ),
]  # fmt: skip
