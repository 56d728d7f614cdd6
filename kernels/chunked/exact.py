"""Dot products with the same bits on every machine, whatever the order of sums, block size and library.

Every row is divided by a power of two and cut into slices of integers. The slices are short, so products of
two slices add up in float64 without rounding (Ozaki et al. 2012), in any order. The few steps that round work
on each entry alone. So equal rows have equal products, wherever they are in the matrix.
"""

import torch
from torch import Tensor

# Entries that are cut at once.
CUT_ENTRIES = 1 << 20


def _slices(dtype: torch.dtype) -> int:
    """Returns the number of slices that a row of this type is cut into."""
    return 3 if dtype == torch.float64 else 2


def _bits(width: int, count: int) -> int:
    """Returns the bits of a slice such that count * width products of two slices add up to at most 2^53."""
    return (51 - (count * width - 1).bit_length()) // 2


def exact_error(width: int, dtype: torch.dtype) -> float:
    """Returns a bound on the error of `exact_products`, for rows of length 1 with `width` entries."""
    count = _slices(dtype)
    # Three errors: bits cut off both rows, pairs of slices left out, and a rounding for each step between
    # slices.
    return (4 + 2 * count) * width * 2.0 ** (-count * _bits(width, count)) + count * 2.0**-53


def _cut(x: Tensor, count: int, bits: int) -> tuple[list[Tensor], Tensor]:
    """Returns (slices, power), with x (r, D) about power * sum of slices[k] * 2^(-bits * (k + 1))."""
    peak = x.abs().amax(1, keepdim=True)
    # Entries become at most 2. A number divided by its mantissa is exactly a power of two; exp2 might round.
    power = torch.where(peak > 0, peak / (2 * torch.frexp(peak).mantissa), 1)
    remainder, slices = x / power, []
    for _ in range(count):
        slices.append(remainder.mul_(2.0**bits).round())
        remainder.sub_(slices[-1])
    return slices, power


def exact_products(rows: Tensor, columns: Tensor, at: Tensor) -> Tensor:
    """Returns rows @ columns[at]^T in float64, each row divided by a power of two: (r, J).

    `rows` is (r, D) and `at` (J,). The power is the same within a row, whose entries can be compared.
    """
    width, count = rows.shape[1], _slices(rows.dtype)
    bits, size = _bits(width, count), max(1, CUT_ENTRIES // width)
    left, _ = _cut(rows.double(), count, bits)
    out = torch.empty(rows.shape[0], at.shape[0], dtype=torch.float64, device=rows.device)
    for start in range(0, at.shape[0], size):
        right, power = _cut(columns[at[start : start + size]].double(), count, bits)
        total = torch.zeros(rows.shape[0], power.shape[0], dtype=torch.float64, device=rows.device)
        # The smallest terms come first. Terms of the same order are added without rounding.
        for order in reversed(range(count)):
            same = left[0] @ right[order].t()
            for k in range(1, order + 1):
                same.addmm_(left[k], right[order - k].t())
            total.mul_(2.0**-bits).add_(same)
        torch.mul(total, power.t(), out=out[:, start : start + size])
    return out
