"""Products of rows with the same bits on every machine: independent of order, block size and library.

Every row is divided by a power of two and cut into slices of integers, short enough that the products of two slices
add up in float64 without rounding (Ozaki et al. 2012). Sums without rounding do not depend on their order, and the
few steps that round are done entry by entry. So equal rows have equal products, wherever they are.
"""

import torch
from torch import Tensor

# Entries of the rows that are cut at once.
CUT_ENTRIES = 1 << 20


def _slices(dtype: torch.dtype) -> int:
    """How many slices a row of dtype is cut into."""
    return 3 if dtype == torch.float64 else 2


def _bits(width: int, count: int) -> int:
    """Bits of a slice: a sum of count * width products of two integers up to 2^(bits + 1) stays within 2^53."""
    return (51 - (count * width - 1).bit_length()) // 2


def exact_error(width: int, dtype: torch.dtype) -> float:
    """A bound of the error of `exact_products`, for rows of length 1 with `width` entries."""
    count = _slices(dtype)
    # The bits cut off both rows, the pairs of slices left out, and a rounding for each step between slices.
    return (4 + 2 * count) * width * 2.0 ** (-count * _bits(width, count)) + count * 2.0**-53


def _cut(x: Tensor, count: int, bits: int) -> tuple[list[Tensor], Tensor]:
    """(slices of x (r, D), the power of two (r, 1) that its rows were divided by); finite rows in float64."""
    peak = x.abs().amax(1, keepdim=True)
    # Entries become at most 2. A number over its mantissa is exactly a power of two; exp2 might round.
    power = torch.where(peak > 0, peak / (2 * torch.frexp(peak).mantissa), 1)
    remainder, slices = x / power, []
    for _ in range(count):
        slices.append(remainder.mul_(2.0**bits).round())
        remainder.sub_(slices[-1])
    return slices, power


def exact_products(rows: Tensor, columns: Tensor, at: Tensor) -> Tensor:
    """rows @ columns[at]^T in float64, each row divided by a power of two: (r, J), for rows (r, D) and at (J,).

    The power is the same within a row, so the entries of one row can be compared with each other.
    """
    width, count = rows.shape[1], _slices(rows.dtype)
    bits, size = _bits(width, count), max(1, CUT_ENTRIES // width)
    left, _ = _cut(rows.double(), count, bits)
    out = torch.empty(rows.shape[0], at.shape[0], dtype=torch.float64, device=rows.device)
    for start in range(0, at.shape[0], size):
        right, power = _cut(columns[at[start : start + size]].double(), count, bits)
        total = torch.zeros(rows.shape[0], power.shape[0], dtype=torch.float64, device=rows.device)
        # From the smallest terms to the largest; within an order nothing is rounded.
        for order in reversed(range(count)):
            same = left[0] @ right[order].t()
            for k in range(1, order + 1):
                same.addmm_(left[k], right[order - k].t())
            total.mul_(2.0**-bits).add_(same)
        torch.mul(total, power.t(), out=out[:, start : start + size])
    return out
