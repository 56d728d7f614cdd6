"""Computes the backward of the hinge loss with hardest negatives, in O(B D) operations.

I and T are images and texts. Let j be the winner (hardest negative) of row i and p its positive. If j
violates the margin, dI_i += T_j - T_p, dT_j += I_i and dT_p -= I_i. For columns, I and T change places. So a
row of a gradient has three parts: its winner, its partner (the positive), and its bucket. The bucket of a row
is the set of rows of the other side that have this row as their winner.

With many rows, one stable sort of the winners makes the buckets. Then one program of `_gather` per row adds
up the row's bucket in ascending order, LINES entries at a time. With few rows of 16 bits, `_few` makes dS
from the winners and multiplies dS with the other side. The entries of dS are integers from -2 to 2, exact in
any type. `_few` takes 2 B N D flops, but one launch and no sort.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2s.kernels.fused.launch import INTERPRETED, cdiv, not_needed, on_device_of, options, storage
from d2s.kernels.fused.spec import KernelSpec
from d2s.kernels.fused.tiles import Tile, tile_for
from d2s.kernels.sides import Winners

# `_few` is used up to this many rows and columns, for 16-bit types. It is not used for float32, because on
# sm_100 Triton 3.7 rounds the operands of this product to TF32, with every precision setting.
FEW = 1024
SIZES = ("size", "others", "shift")


@triton.jit(do_not_specialize=SIZES)
def _gather(
    grad,  # ()
    other,  # (others, D)
    own_at,  # (size,)
    own_active,  # (size,)
    bucket_active,  # (others,)
    starts,  # (size + 1,)
    order,  # (others,)
    out,  # (size, D)
    size, others, shift,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, LINES: tl.constexpr, OWN: tl.constexpr, BUCKET: tl.constexpr,
):  # fmt: skip
    """Computes COLUMNS channels of one row of `out`. The partner of the row is other[row + shift]."""
    row = tl.program_id(0)
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    line = tl.arange(0, LINES)
    value = tl.zeros((COLUMNS,), tl.float32)
    partner = row + shift
    paired = (partner >= 0) & (partner < others)
    pull = 0.0
    if BUCKET:
        pull += tl.load(bucket_active + partner, mask=paired, other=0).to(tl.float32)
        stop = tl.load(starts + row + 1)
        for at in range(tl.load(starts + row), stop, LINES):
            inside = at + line < stop
            pointers = other + tl.load(order + at + line, mask=inside, other=0)[:, None] * WIDTH + k[None, :]
            tile = tl.load(pointers, mask=inside[:, None] & (k < WIDTH)[None, :], other=0.0)
            value += tl.sum(tile.to(tl.float32), 0)
    if OWN:
        active = tl.load(own_active + row).to(tl.float32)
        pull += active
        winner = other + tl.load(own_at + row) * WIDTH
        value += active * tl.load(winner + k, mask=k < WIDTH, other=0.0).to(tl.float32)
    positive = other + partner.to(tl.int64) * WIDTH
    value -= pull * tl.load(positive + k, mask=paired & (k < WIDTH), other=0.0).to(tl.float32)
    pointers = out + row.to(tl.int64) * WIDTH + k
    tl.store(pointers, (tl.load(grad) * value).to(out.dtype.element_ty), mask=k < WIDTH)


@triton.jit(do_not_specialize=SIZES)
def _few(
    grad,  # ()
    other,  # (others, D)
    own_at,  # (size,)
    own_active,  # (size,)
    bucket_at,  # (others,)
    bucket_active,  # (others,)
    out,  # (size, D)
    size, others, shift,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LINES: tl.constexpr, OWN: tl.constexpr,
    BUCKET: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Computes ROWS x COLUMNS entries of out = dS @ other. Reads LINES rows of `other` at a time."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    partner = row + shift
    paired = (row < size) & (partner >= 0) & (partner < others)
    pull = tl.zeros((ROWS,), tl.float32)
    own = tl.full((ROWS,), -1, tl.int64)
    if BUCKET:
        pull += tl.load(bucket_active + partner, mask=paired, other=0).to(tl.float32)
    if OWN:
        active = tl.load(own_active + row, mask=row < size, other=0)
        own = tl.where(active != 0, tl.load(own_at + row, mask=row < size, other=-1), own)
        pull += active.to(tl.float32)
    value = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, others, LINES):
        index = start + tl.arange(0, LINES)
        inside = index < others
        weight = tl.where(own[:, None] == index[None, :], 1.0, 0.0)
        if BUCKET:
            chosen = tl.load(bucket_at + index, mask=inside, other=-1)
            chosen = tl.where(tl.load(bucket_active + index, mask=inside, other=0) != 0, chosen, -1)
            weight += tl.where(row[:, None] == chosen[None, :], 1.0, 0.0)
        weight -= tl.where(partner[:, None] == index[None, :], pull[:, None], 0.0)
        pointers = other + index[:, None] * WIDTH + k[None, :]
        y = tl.load(pointers, mask=inside[:, None] & (k < WIDTH)[None, :], other=0.0)
        if UPCAST:
            y = y.to(tl.float32)
        value = tl.dot(weight.to(y.dtype), y, value, input_precision="ieee")
    mask = (row < size)[:, None] & (k < WIDTH)[None, :]
    pointers = out + row[:, None] * WIDTH + k[None, :]
    tl.store(pointers, (tl.load(grad) * value).to(out.dtype.element_ty), mask=mask)


def _buckets(at: Tensor, active: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Returns (starts, order). order[starts[r] : starts[r + 1]] is the bucket of row r, ascending."""
    keys = torch.where(active, at, size).to(torch.int32)
    keys, order = torch.sort(keys, stable=True)
    rows = torch.arange(size + 1, dtype=torch.int32, device=at.device)
    return torch.searchsorted(keys, rows), order


def _one_side(
    grad: Tensor,
    other: Tensor,
    size: int,
    own: tuple[Tensor, Tensor] | None,
    bucket: tuple[Tensor, Tensor] | None,
    shift: int,
) -> Tensor:
    """Returns one side's gradient (size, D). `own` has this side's `Winners` fields, `bucket` the other's."""
    others, width = other.shape
    out = torch.empty(size, width, dtype=storage(other.dtype), device=other.device)
    own_at, own_active = own or (grad, grad)
    bucket_at, bucket_active = bucket or (grad, grad)
    flags = {"WIDTH": width, "OWN": own is not None, "BUCKET": bucket is not None}
    with on_device_of(other):
        if other.element_size() == 2 and max(size, others) <= FEW:
            tile = tile_for("hinge_few", other)
            _few[cdiv(size, tile.rows), cdiv(width, tile.columns)](
                grad, other, own_at, own_active, bucket_at, bucket_active, out, size, others, shift,
                ROWS=tile.rows, COLUMNS=tile.columns, LINES=tile.depth, UPCAST=INTERPRETED, **flags,
                **options(tile),
            )  # fmt: skip
        else:
            tile = tile_for("hinge_gather", other)
            starts, order = _buckets(*bucket, size) if bucket else (grad, grad)
            _gather[size, cdiv(width, tile.columns)](
                grad, other, own_at, own_active, bucket_active, starts, order, out, size, others, shift,
                COLUMNS=tile.columns, LINES=tile.depth, **flags, **options(tile),
            )  # fmt: skip
    return out.to(other.dtype)


def hinge_max_backward(
    grad: Tensor,
    image: Tensor,
    text: Tensor,
    winners: Winners,
    offset: int,
    need: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Returns d_image, of shape (B, D), and d_text, of shape (N, D), in the types of `image` and `text`.

    A gradient that `need` does not select is empty. `winners` comes from `hinge_max_forward`.
    """
    grad = grad.to(torch.float32)
    image, text = image.contiguous(), text.contiguous()
    rows, columns = winners[:2], winners[2:] if winners.column_at.numel() else None
    d_image, d_text = not_needed(image), not_needed(text)
    if need[0]:
        d_image = _one_side(grad, text, image.shape[0], rows, columns, offset)
    if need[1]:
        d_text = _one_side(grad, image, text.shape[0], columns, rows, -offset)
    return d_image, d_text


def _constants(tile: Tile, width: int, half: bool) -> dict[str, object]:
    return {"WIDTH": width, "COLUMNS": tile.columns, "LINES": tile.depth, "OWN": True, "BUCKET": True}


_POINTERS = {
    "grad": "*fp32",
    **dict.fromkeys(("other", "out"), "*x"),
    "own_at": "*i64",
    **dict.fromkeys(("own_active", "bucket_active"), "*i1"),
}
SPECS = [
    KernelSpec(
        name="hinge_gather",
        kernel=_gather,
        pointers={**_POINTERS, **dict.fromkeys(("starts", "order"), "*i64")},
        constants=_constants,
        unaligned=frozenset({"grad"}),
        dots=False,
    ),
    KernelSpec(
        name="hinge_few",
        kernel=_few,
        pointers={**_POINTERS, "bucket_at": "*i64"},
        constants=lambda tile, width, half: {
            **_constants(tile, width, half), "ROWS": tile.rows, "UPCAST": False
        },
        unaligned=frozenset({"grad"}),
        dtypes=("bf16",),
    ),
]  # fmt: skip
