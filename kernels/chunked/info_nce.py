"""Implements symmetric InfoNCE with a learnable scale. The backward computes S again.

Let z = scale * S. Each row costs half of logsumexp(row of z) - z_positive, and so does each column. The
gradient with respect to z is half of (softmax by rows + softmax by columns), minus 1 at a positive.

On a CPU, rows and columns share one exponential per entry, exp(z - m), with one number m for the whole
matrix. Bounds on z tell beforehand whether there is an m with which no sum overflows and no sum loses digits
by underflow. With rows of length 1, there always is one for scale 14. For scale 100 there is one unless a
positive is very dissimilar. If there is none, rows and columns use their own maxima. Other devices do so
always, because the host would have to wait for the bounds.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from d2s.kernels.chunked.common import SamePairs, Sweep, full_precision, positive_entries, row_dots, upcast
from d2s.kernels.sides import Sides

# Maps a type to two limits: the largest exponent, also of a sum, and how far a log-sum-exp may lie below m.
# Within this distance, terms that underflow are below exp(-32) of the sum (float64: exp(-60)).
_RANGE = {torch.float32: (80.0, 55.0), torch.float64: (690.0, 640.0)}


def _mask(z: Tensor, same: SamePairs, start: int, stop: int, offset: int) -> Tensor:
    """Sets the same-image entries of chunk `z` to -inf, except the positives. Returns the positives."""
    diagonal = positive_entries(z, start, offset)
    positive = diagonal.clone()
    same.fill(z, start, stop, -torch.inf)
    diagonal.copy_(positive)
    return positive


def common_shift(rows: Tensor, columns: Tensor, factor: Tensor, offset: int) -> float | None:
    """Returns the valid m nearest to 0 (see the module), or None if no m is valid or this is not a CPU."""
    if rows.device.type != "cpu":
        return None
    n, m = rows.shape[0], columns.shape[0]
    longest = (row_dots(rows, rows).max() * row_dots(columns, columns).max()).sqrt()
    most = float(longest * factor.abs()) + math.log(max(n, m))
    # The log-sum-exp of a row or column is at least the z of its positive.
    least = float((factor * row_dots(rows, columns[offset : offset + n])).min())
    high, low = _RANGE[rows.dtype]
    first, last = most - high, least + low
    return min(max(0.0, first), last) if first <= last else None


def info_nce_forward(sides: Sides, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (loss, row_lse, column_lse) of shapes (), (B,) and (N,), in the accumulator type.

    `row_lse` and `column_lse` are the log-sum-exps of the rows and columns of scale * S. If `sides.both` is
    false, `column_lse` is empty.
    """
    image, text, image_ids, text_ids, offset, both = sides
    with full_precision(image.device):
        rows, columns = upcast(image), upcast(text)
        n, m = rows.shape[0], columns.shape[0]
        factor = scale.to(rows.dtype).reshape(())
        same = SamePairs(image_ids, text_ids)
        shift = common_shift(rows, columns, factor, offset)
        if shift is not None:
            return _forward_at_once(rows, columns, same, float(factor), shift, offset, both)
        positive, row_lse = rows.new_empty(n), rows.new_empty(n)
        top = rows.new_full((m,), -torch.inf)
        total = rows.new_zeros(m)
        sweep = Sweep(rows, columns)
        buffer = torch.empty_like(sweep.buffer)
        for start, stop, s in sweep:
            positive[start:stop] = _mask(s.mul_(factor), same, start, stop, offset)
            row_top = s.amax(1, keepdim=True)
            row_total = torch.sub(s, row_top, out=buffer[: stop - start]).exp_().sum(1)
            row_lse[start:stop] = row_top.squeeze(1) + row_total.log_()
            if both:
                new = torch.maximum(top, s.amax(0))
                # If all entries of a column are -inf so far, its sum is 0, and any finite reference is right.
                reference = torch.where(new == -torch.inf, 0, new)
                total *= torch.exp(top - reference)
                total += s.sub_(reference).exp_().sum(0)
                top = new
        loss = 0.5 * (row_lse - positive).sum()
        if not both:
            return loss, row_lse, rows.new_empty(0)
        column_lse = top + torch.log(total)
        return loss + 0.5 * (column_lse - positive).sum(), row_lse, column_lse


def _forward_at_once(
    rows: Tensor, columns: Tensor, same: SamePairs, factor: float, shift: float, offset: int, both: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `info_nce_forward` with one exponential per entry. `shift` comes from `common_shift`."""
    n, m = rows.shape[0], columns.shape[0]
    positive, row_total = rows.new_empty(n), rows.new_empty(n)
    total = rows.new_zeros(m if both else 0)
    for start, stop, z in Sweep(rows, columns, factor):
        positive[start:stop] = _mask(z, same, start, stop, offset)
        _exponential(z, shift)
        torch.sum(z, 1, out=row_total[start:stop])
        if both:
            total += z.sum(0)
    row_lse, column_lse = row_total.log_().add_(shift), total.log_().add_(shift)
    loss = 0.5 * (row_lse - positive).sum()
    if both:
        loss = loss + 0.5 * (column_lse - positive).sum()
    return loss, row_lse, column_lse


def _exponential(z: Tensor, shift: float) -> Tensor:
    """Replaces z by exp(z - shift), in place, and returns z."""
    return (z.sub_(shift) if shift else z).exp_()


def _probabilities(
    rows: Tensor,
    columns: Tensor,
    same: SamePairs,
    factor: Tensor,
    row_lse: Tensor,
    column_lse: Tensor | None,
    offset: int,
) -> Iterator[tuple[int, int, Tensor]]:
    """Yields (start, stop, p). p is softmax by rows (+ softmax by columns if `column_lse` is given)."""
    shift = common_shift(rows, columns, factor, offset)
    sweep = Sweep(rows, columns, 1.0 if shift is None else float(factor))
    buffer = torch.empty_like(sweep.buffer)
    if shift is not None:
        # exp(z - row_lse) + exp(z - column_lse) = exp(z - m) * (by_row + by_column).
        by_row = torch.exp(shift - row_lse)[:, None]
        by_column = None if column_lse is None else torch.exp(shift - column_lse)
    for start, stop, z in sweep:
        part = buffer[: stop - start]
        if shift is None:
            _mask(z.mul_(factor), same, start, stop, offset)
            p = torch.sub(z, row_lse[start:stop, None], out=part).exp_()
            if column_lse is not None:
                p += z.sub_(column_lse).exp_()
        else:
            _mask(z, same, start, stop, offset)
            own = by_row[start:stop]
            weight = own if by_column is None else torch.add(own, by_column, out=part)
            p = _exponential(z, shift).mul_(weight)
        yield start, stop, p


def info_nce_backward(
    sides: Sides, scale: Tensor, row_lse: Tensor, column_lse: Tensor, grad: Tensor, need: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns d_image, d_text and d_scale, in the shapes and types of `image`, `text` and `scale`.

    A gradient that `need` does not select is empty. `row_lse` and `column_lse` come from `info_nce_forward`.
    `grad` is the gradient with respect to the loss.
    """
    image, text, image_ids, text_ids, offset, both = sides
    need_image, need_text, need_scale = need
    with full_precision(image.device):
        rows, columns = upcast(image), upcast(text)
        n = rows.shape[0]
        factor = scale.to(rows.dtype).reshape(())
        half = 0.5 * grad
        same = SamePairs(image_ids, text_ids)
        d_rows = torch.empty_like(rows) if need_image or need_scale else rows.new_empty(0)
        d_columns = torch.zeros_like(columns) if need_text else rows.new_empty(0)
        for start, stop, p in _probabilities(
            rows, columns, same, factor, row_lse, column_lse if both else None, offset
        ):
            if need_image or need_scale:
                torch.mm(p, columns, out=d_rows[start:stop])
            if need_text:
                d_columns.addmm_(p.t(), rows[start:stop])
        pull = 2.0 if both else 1.0
        d_scale = scale.new_empty(0)
        if need_image or need_scale:
            d_rows.sub_(columns[offset : offset + n], alpha=pull)
            if need_scale:
                # d_scale is the sum of dz * S. It equals the sum of the dot products of `rows` and `d_rows`.
                d_scale = (half * row_dots(d_rows, rows).sum()).reshape(scale.shape).to(scale.dtype)
        if need_text:
            d_columns[offset : offset + n].sub_(rows, alpha=pull)
        return (
            d_rows.mul_(half * factor).to(image.dtype) if need_image else image.new_empty(0),
            d_columns.mul_(half * factor).to(text.dtype),
            d_scale,
        )
