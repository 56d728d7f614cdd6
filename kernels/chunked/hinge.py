"""Implements the hinge loss of VSE++, with all negatives or the hardest of each row and column.

A negative violates the margin if (similarity + margin) exceeds the similarity of the positive.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from d2s.kernels.chunked.common import (
    SamePairs,
    Sweep,
    column_maxima,
    full_precision,
    positive_entries,
    row_dots,
    row_maxima,
    upcast,
)
from d2s.kernels.sides import Sides, Winners


def hinge_max_forward(sides: Sides, margin: float) -> tuple[Tensor, ...]:
    """Returns the loss, then the fields of `Winners`. See `d2s.kernels.functional.hinge_loss`."""
    image, text, image_ids, text_ids, offset, both = sides
    with full_precision(image.device):
        rows, columns = upcast(image), upcast(text)
        n, m = rows.shape[0], columns.shape[0]
        same = SamePairs(image_ids, text_ids)
        positive = rows.new_empty(n)
        row_best, row_at = rows.new_empty(n), image_ids.new_empty(n)
        column_best = rows.new_full((m if both else 0,), -torch.inf)
        column_at = image_ids.new_zeros(m if both else 0)
        for start, stop, s in Sweep(rows, columns):
            diagonal = positive_entries(s, start, offset)
            positive[start:stop] = diagonal
            diagonal.fill_(-torch.inf)
            same.fill(s, start, stop, -torch.inf)
            row_best[start:stop], row_at[start:stop] = row_maxima(s)
            if both:
                best, at = column_maxima(s)
                # Only a strictly larger value replaces an earlier one. So ties go to the lowest index.
                better = best > column_best
                column_best = torch.where(better, best, column_best)
                column_at = torch.where(better, at + start, column_at)
        row_cost = (margin + row_best - positive).clamp_min(0)
        loss = row_cost.sum()
        if not both:
            nothing = column_at.new_empty(0, dtype=torch.bool)
            return loss, row_at, row_cost > 0, column_at, nothing
        column_cost = (margin + column_best - positive).clamp_min(0)
        return loss + column_cost.sum(), row_at, row_cost > 0, column_at, column_cost > 0


def _sum_rows(index: Tensor, source: Tensor, weight: Tensor, target: Tensor, size: int) -> Tensor:
    """Adds weight[k] * source[index[k]] to out[target[k]] for k = 0, 1, ..., and returns `out` (size, D)."""
    order = torch.argsort(target, stable=True)
    starts = torch.searchsorted(target[order], torch.arange(size, device=target.device))
    return embedding_bag(index[order], source, starts, mode="sum", per_sample_weights=weight[order])


def hinge_max_backward(
    grad: Tensor,
    image: Tensor,
    text: Tensor,
    winners: Winners,
    offset: int,
    need: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Returns d_image, of shape (B, D), and d_text, of shape (N, D), in the types of `image` and `text`.

    A gradient that `need` does not select is empty. Let p be the positive of row i. If the winner j of row i
    violates the margin, the function adds grad * (text[j] - text[p]) to d_image[i], grad * image[i] to
    d_text[j], and -grad * image[i] to d_text[p]. For columns, image and text change places.
    """
    rows, columns = upcast(image), upcast(text)
    n, m = rows.shape[0], columns.shape[0]
    here = torch.arange(n, device=rows.device)
    i, j, active = here, winners.row_at, winners.row_active
    if winners.column_at.shape[0]:
        i, j = torch.cat([i, winners.column_at]), torch.cat([j, here])
        active = torch.cat([active, winners.column_active])
    weight = active.to(rows.dtype) * grad
    # `here` becomes the row of the positive that belongs to each violation. Its column is here + offset.
    here = here.repeat(i.shape[0] // n)
    i_all, j_all = torch.cat([i, here]), torch.cat([j, here + offset])
    weights = torch.cat([weight, -weight])
    return (
        _sum_rows(j_all, columns, weights, i_all, n).to(image.dtype) if need[0] else image.new_empty(0),
        _sum_rows(i_all, rows, weights, j_all, m).to(text.dtype) if need[1] else text.new_empty(0),
    )


def _add_products(a: Tensor, rows: Tensor, columns: Tensor, d_rows: Tensor, d_columns: Tensor) -> None:
    """Writes a @ columns to `d_rows` and adds a^T @ rows to `d_columns`. Skips an output that is empty.

    `a` has shape (r, N) and counts the margins that each pair violates. `d_rows` must be zero before. On a
    CPU, the function skips the rows of `a` that are zero. Late in training, most rows are.
    """
    if a.device.type == "cpu":
        busy = a.sum(1).nonzero().squeeze(1)
        if 4 * busy.shape[0] <= 3 * a.shape[0]:
            if busy.shape[0] == 0:
                return
            a, rows = a[busy], rows[busy]
            if d_rows.numel():
                d_rows[busy] = a @ columns
                d_rows = d_rows.new_empty(0)
    if d_rows.numel():
        torch.mm(a, columns, out=d_rows)
    if d_columns.numel():
        d_columns.addmm_(a.t(), rows)


def hinge_sum_forward(sides: Sides, margin: float, need: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (loss, d_image, d_text) of shapes (), (B, D) and (N, D), in the accumulator type.

    A gradient that `need` does not select is empty. The gradient with respect to the similarity of a
    negative is the number of margins that it violates: 0, 1 (in its row or column) or 2 (in both). Each
    violation subtracts 1 from the gradient of the positive pair. See `d2s.kernels.functional.hinge_loss`.
    """
    image, text, image_ids, text_ids, offset, both = sides
    need_image, need_text = need
    with full_precision(image.device):
        rows, columns = upcast(image), upcast(text)
        n = rows.shape[0]
        same = SamePairs(image_ids, text_ids)
        matched = columns[offset : offset + n]
        positive = row_dots(rows, matched)
        loss = rows.new_zeros(())
        d_rows = torch.zeros_like(rows) if need_image else rows.new_empty(0)
        d_columns = torch.zeros_like(columns) if need_text else rows.new_empty(0)
        pull = rows.new_zeros(n)
        sweep = Sweep(rows, columns)
        active = torch.empty_like(sweep.buffer)
        for start, stop, s in sweep:
            positive_entries(s, start, offset).fill_(-torch.inf)
            same.fill(s, start, stop, -torch.inf)
            # `a` becomes the cost of each entry. Its sign, 1 or 0, is the gradient with respect to S.
            a = torch.sub(s, positive[start:stop, None] - margin, out=active[: stop - start])
            loss += a.relu_().sum()
            pull[start:stop] += a.sign_().sum(1)
            if both:
                loss += s.sub_(positive - margin).relu_().sum()
                pull += s.sign_().sum(0)
                a += s
            _add_products(a, rows[start:stop], columns, d_rows[start:stop], d_columns)
        if need_image:
            d_rows.addcmul_(pull[:, None], matched, value=-1)
        if need_text:
            d_columns[offset : offset + n].addcmul_(pull[:, None], rows, value=-1)
        return loss, d_rows, d_columns
