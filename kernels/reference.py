"""The reference implementation: dense, in float64, with automatic differentiation.

Tests and benchmarks compare the other implementations with the reference. So the reference shares no code with
them. It stores whole B x N matrices. `d2s.kernels.functional` describes the arguments. Losses are computed in
float64. The result is then cast to float32 or, for float64 inputs, stays float64, as in the other implementations.
"""

import torch
from torch import Tensor

from d2s.kernels.sides import Sides


def _double(x: Tensor) -> Tensor:
    return x.to(torch.float64)


def _cast_loss(loss: Tensor, like: Tensor) -> Tensor:
    return loss if like.dtype == torch.float64 else loss.to(torch.float32)


def _masks(sides: Sides) -> tuple[Tensor, Tensor]:
    """Returns two boolean masks of shape (B, N): the positive pairs, and the negative pairs."""
    row = torch.arange(sides.image.shape[0], device=sides.image.device)
    column = torch.arange(sides.text.shape[0], device=sides.text.device)
    positive = column[None, :] == row[:, None] + sides.offset
    return positive, (sides.image_ids[:, None] != sides.text_ids[None, :]) & ~positive


def _hardest_of(cost: Tensor, negative: Tensor, dim: int) -> Tensor:
    """Returns the largest `cost` of a negative along `dim`, or 0 without negatives. Ties go to the lowest index."""
    index = torch.where(negative, cost, -torch.inf).detach().cpu().numpy().argmax(dim)
    index = torch.from_numpy(index).to(cost.device).unsqueeze(dim)
    return torch.where(negative, cost, 0).gather(dim, index)


def hinge_loss(sides: Sides, margin: float, hardest: bool) -> Tensor:
    """See `d2s.kernels.functional.hinge_loss`."""
    s = _double(sides.image) @ _double(sides.text).T
    positive, negative = _masks(sides)
    own = s[positive]
    loss = s.new_zeros(())
    for dim, matched in ((1, own[:, None]), (0, own[None, :]))[: 1 + sides.both]:
        if hardest:
            # Chooses before negative costs are clamped to 0, because clamped costs would tie.
            picked = _hardest_of(margin + s - matched, negative, dim)
            some = negative.any(dim, keepdim=True)
            loss = loss + torch.where(some, torch.relu(picked), 0).sum()
        else:
            loss = loss + torch.where(negative, torch.relu(margin + s - matched), 0).sum()
    return _cast_loss(loss, sides.image)


def info_nce_loss(sides: Sides, scale: Tensor) -> Tensor:
    """See `d2s.kernels.functional.info_nce_loss`."""
    z = _double(scale) * (_double(sides.image) @ _double(sides.text).T)
    positive, negative = _masks(sides)
    z_used = z.masked_fill(~(positive | negative), -torch.inf)
    loss = -torch.log_softmax(z_used, 1)[positive].sum() / 2
    if sides.both:
        loss = loss - torch.log_softmax(z_used, 0)[positive].sum() / 2
    return _cast_loss(loss, sides.image)


def sigmoid_loss(sides: Sides, scale: Tensor, bias: Tensor) -> Tensor:
    """See `d2s.kernels.functional.sigmoid_loss`."""
    z = _double(scale) * (_double(sides.image) @ _double(sides.text).T) + _double(bias)
    positive, negative = _masks(sides)
    sign = positive.to(z.dtype) - negative.to(z.dtype)
    cost = -torch.nn.functional.logsigmoid(sign * z)
    return _cast_loss(torch.where(sign != 0, cost, 0).sum(), sides.image)


def _unit(x: Tensor) -> Tensor:
    zero = (x == 0).all(1, keepdim=True)
    return torch.where(zero, 0, x / torch.where(zero, 1, x).norm(dim=1, keepdim=True))


def pointwise_distillation(student: Tensor, teacher: Tensor, kind: str, normalize: bool) -> Tensor:
    """See `d2s.kernels.functional.pointwise_distillation`."""
    s, t = _double(student), _double(teacher.detach())
    if normalize:
        s, t = _unit(s), _unit(t)
    cost = {
        "cosine": lambda: 1 - (s * t).sum(1),
        "l1": lambda: (s - t).abs().sum(1),
        "l2": lambda: ((s - t) ** 2).sum(1),
    }[kind]()
    return _cast_loss(cost.sum(), student)


def relational_distillation(
    student: Tensor, teacher: Tensor, student_all: Tensor, teacher_all: Tensor, temperature: float
) -> Tensor:
    """See `d2s.kernels.functional.relational_distillation`."""
    s = _double(student) @ _double(student_all).T / temperature
    t = (_double(teacher) @ _double(teacher_all).T / temperature).detach()
    p, q = torch.softmax(t, 1), torch.log_softmax(s, 1)
    return _cast_loss((torch.xlogy(p, p) - p * q).sum(), student)


def gpo_pool(features: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """See `d2s.kernels.functional.gpo_pool`."""
    pooled = []
    for x, w, m in zip(_double(features), _double(weights), mask, strict=True):
        tokens = x[m]
        ordered = torch.sort(tokens, dim=0, descending=True, stable=True).values
        pooled.append((w[: tokens.shape[0], None] * ordered).sum(0))
    out = torch.stack(pooled) if pooled else _double(features).sum(1)
    return out.to(features.dtype)


def _even_sums(x: Tensor) -> Tensor:
    """Returns the sum of each row of `x`, of shape (N, D). Equal rows get equal sums, but not from torch.sum."""
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        x = torch.cat([x[:, :half] + x[:, half : 2 * half], x[:, 2 * half :]], 1)
    return x[:, 0]


def retrieval_ranks(
    queries: Tensor,
    candidates: Tensor,
    positives: tuple[Tensor, Tensor] | None,
    query_ids: Tensor | None,
    candidate_ids: Tensor | None,
) -> Tensor:
    """See `d2s.kernels.functional.retrieval_ranks`."""
    ranks = []
    for i, query in enumerate(_double(queries)):
        row = _even_sums(query * _double(candidates))
        if positives is not None:
            starts, indices = positives
            own = torch.zeros_like(row, dtype=torch.bool)
            own[indices[starts[i] : starts[i + 1]]] = True
        else:
            own = candidate_ids == query_ids[i]
        best = row[own].max() if own.any() else -torch.inf
        ranks.append(int((~own & ~(row < best)).sum()))
    return torch.tensor(ranks, dtype=torch.int64, device=queries.device)
