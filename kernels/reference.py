"""Dense float64 oracles: the definitions, written out, with automatic differentiation.

They share no code with the other implementations, make every N x M matrix they mention, and are there to be
compared with. Arguments as in `d2s.kernels.functional`; a loss is computed in float64 and then cast to the
float32 that the other implementations give (float64 inputs keep float64).
"""

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float64)


def _narrow(loss: Tensor, like: Tensor) -> Tensor:
    return loss if like.dtype == torch.float64 else loss.to(torch.float32)


def _masks(image_ids: Tensor, text_ids: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """(positive, negative), (n, M) bool each."""
    column = torch.arange(text_ids.shape[0], device=text_ids.device)
    row = torch.arange(image_ids.shape[0], device=image_ids.device)
    positive = column[None, :] == row[:, None] + offset
    return positive, (image_ids[:, None] != text_ids[None, :]) & ~positive


def _hardest_of(cost: Tensor, negative: Tensor, dim: int) -> Tensor:
    """The cost of the first hardest negative along dim; argmax gives the lowest index of equal ones."""
    index = torch.where(negative, cost, -torch.inf).detach().cpu().numpy().argmax(dim)
    index = torch.from_numpy(index).to(cost.device).unsqueeze(dim)
    return torch.where(negative, cost, 0).gather(dim, index)


def hinge_loss(
    image: Tensor,
    text: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    *,
    margin: float,
    hardest: bool,
    offset: int,
    both: bool,
) -> Tensor:
    """See `d2s.kernels.functional.hinge_loss`."""
    s = _wide(image) @ _wide(text).T
    positive, negative = _masks(image_ids, text_ids, offset)
    own = s[positive]
    loss = s.new_zeros(())
    for dim, matched in ((1, own[:, None]), (0, own[None, :]))[: 1 + both]:
        cost = torch.where(negative, torch.relu(margin + s - matched), 0)
        if hardest:
            # The hardest is chosen by similarity, so that a tie of costs of 0 cannot matter.
            picked = _hardest_of(margin + s - matched, negative, dim)
            some = negative.any(dim, keepdim=True)
            loss = loss + torch.where(some, torch.relu(picked), 0).sum()
        else:
            loss = loss + cost.sum()
    return _narrow(loss, image)


def info_nce_loss(
    image: Tensor,
    text: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    *,
    scale: Tensor,
    offset: int,
    both: bool,
) -> Tensor:
    """See `d2s.kernels.functional.info_nce_loss`."""
    z = _wide(scale) * (_wide(image) @ _wide(text).T)
    positive, negative = _masks(image_ids, text_ids, offset)
    z_used = z.masked_fill(~(positive | negative), -torch.inf)
    loss = -torch.log_softmax(z_used, 1)[positive].sum() / 2
    if both:
        loss = loss - torch.log_softmax(z_used, 0)[positive].sum() / 2
    return _narrow(loss, image)


def sigmoid_loss(
    image: Tensor,
    text: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    *,
    scale: Tensor,
    bias: Tensor,
    offset: int,
) -> Tensor:
    """See `d2s.kernels.functional.sigmoid_loss`."""
    z = _wide(scale) * (_wide(image) @ _wide(text).T) + _wide(bias)
    positive, negative = _masks(image_ids, text_ids, offset)
    sign = positive.to(z.dtype) - negative.to(z.dtype)
    cost = -torch.nn.functional.logsigmoid(sign * z)
    return _narrow(torch.where(sign != 0, cost, 0).sum(), image)


def _unit(x: Tensor) -> Tensor:
    zero = (x == 0).all(1, keepdim=True)
    return torch.where(zero, 0, x / torch.where(zero, 1, x).norm(dim=1, keepdim=True))


def pointwise_distillation(student: Tensor, teacher: Tensor, *, kind: str, normalize: bool) -> Tensor:
    """See `d2s.kernels.functional.pointwise_distillation`."""
    s, t = _wide(student), _wide(teacher.detach())
    if normalize:
        s, t = _unit(s), _unit(t)
    cost = {
        "cosine": lambda: 1 - (s * t).sum(1),
        "l1": lambda: (s - t).abs().sum(1),
        "l2": lambda: ((s - t) ** 2).sum(1),
    }[kind]()
    return _narrow(cost.sum(), student)


def relational_distillation(
    student: Tensor, teacher: Tensor, student_all: Tensor, teacher_all: Tensor, *, temperature: float
) -> Tensor:
    """See `d2s.kernels.functional.relational_distillation`."""
    s = _wide(student) @ _wide(student_all).T / temperature
    t = (_wide(teacher) @ _wide(teacher_all).T / temperature).detach()
    p, q = torch.softmax(t, 1), torch.log_softmax(s, 1)
    return _narrow((torch.xlogy(p, p) - p * q).sum(), student)


def gpo_pool(features: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """See `d2s.kernels.functional.gpo_pool`."""
    pooled = []
    for x, w, m in zip(_wide(features), _wide(weights), mask, strict=True):
        tokens = x[m]
        ordered = torch.sort(tokens, dim=0, descending=True, stable=True).values
        pooled.append((w[: tokens.shape[0], None] * ordered).sum(0))
    out = torch.stack(pooled) if pooled else _wide(features).sum(1)
    return out.to(features.dtype)


def _even_sums(x: Tensor) -> Tensor:
    """The sum of each row of x (M, D): (M,). Equal rows have equal sums, which products and sums do not promise."""
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
    for i, query in enumerate(_wide(queries)):
        row = _even_sums(query * _wide(candidates))
        if positives is not None:
            starts, indices = positives
            own = torch.zeros_like(row, dtype=torch.bool)
            own[indices[starts[i] : starts[i + 1]]] = True
        else:
            own = candidate_ids == query_ids[i]
        best = row[own].max() if own.any() else -torch.inf
        ranks.append(int((~own & ~(row < best)).sum()))
    return torch.tensor(ranks, dtype=torch.int64, device=queries.device)
