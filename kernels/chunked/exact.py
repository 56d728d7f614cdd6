"""Computes dot products with the same bits on every machine, with any order of sums, block size and library.

Every row is divided by a power of two and cut into slices of short integers. Products of two slices add up in
float64 without rounding, in any order, because the integers are short (Ozaki et al. 2012). Only operations on
single entries round. So equal rows have equal products, at every position in the matrix.
"""

import torch
from torch import Tensor

# Entries of `columns` that `exact_products` cuts into slices at once.
CUT_ENTRIES = 1 << 20


def _slices(dtype: torch.dtype) -> int:
    """Returns the number of slices into which `_cut` divides a row of type `dtype`."""
    return 3 if dtype == torch.float64 else 2


def _bits(width: int, count: int) -> int:
    """Returns how many bits a slice may have, so that a sum of count * width products is at most 2^53."""
    return (51 - (count * width - 1).bit_length()) // 2


def exact_error(width: int, dtype: torch.dtype) -> float:
    """Returns a bound on the error of `exact_products`, for rows with norm 1 and `width` entries."""
    count = _slices(dtype)
    # There are three errors: the bits that are cut off, the pairs of slices that are left out, and one
    # rounding for each order of slices.
    return (4 + 2 * count) * width * 2.0 ** (-count * _bits(width, count)) + count * 2.0**-53


def _cut(x: Tensor, count: int, bits: int) -> tuple[list[Tensor], Tensor]:
    """Returns (slices, power), so that x is about power * sum over k of slices[k] * 2^(-bits * (k + 1))."""
    peak = x.abs().amax(1, keepdim=True)
    # x / power has entries up to 2. A number divided by its mantissa is exactly a power of two, unlike exp2.
    power = torch.where(peak > 0, peak / (2 * torch.frexp(peak).mantissa), 1)
    remainder, slices = x / power, []
    for _ in range(count):
        slices.append(remainder.mul_(2.0**bits).round())
        remainder.sub_(slices[-1])
    return slices, power


def exact_products(rows: Tensor, columns: Tensor, at: Tensor) -> Tensor:
    """Returns rows @ columns[at]^T, of shape (r, J), in float64. Each row is divided by a power of two.

    `rows` has shape (r, D) and the indices `at` have shape (J,). All entries of a row are divided by the same
    power, so they can be compared with each other.
    """
    width, count = rows.shape[1], _slices(rows.dtype)
    bits, size = _bits(width, count), max(1, CUT_ENTRIES // width)
    left, _ = _cut(rows.double(), count, bits)
    out = torch.empty(rows.shape[0], at.shape[0], dtype=torch.float64, device=rows.device)
    for start in range(0, at.shape[0], size):
        right, power = _cut(columns[at[start : start + size]].double(), count, bits)
        total = torch.zeros(rows.shape[0], power.shape[0], dtype=torch.float64, device=rows.device)
        # Products of slices i and k have order i + k. Sums within an order are exact. Add the smallest first.
        for order in reversed(range(count)):
            same = left[0] @ right[order].t()
            for k in range(1, order + 1):
                same.addmm_(left[k], right[order - k].t())
            total.mul_(2.0**-bits).add_(same)
        torch.mul(total, power.t(), out=out[:, start : start + size])
    return out
