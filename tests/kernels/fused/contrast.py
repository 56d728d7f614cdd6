"""One way to run each contrastive loss: by the raw Triton functions, by plain dense torch, and by the oracle."""

from dataclasses import dataclass, replace

import torch
from judge import assert_as_good
from problems import image_ids, sides
from torch import Tensor

from d2s.kernels import fused, reference
from d2s.kernels.sides import Sides, Winners

ALL = (True, True, True, True)
GRAD = 0.75


@dataclass(frozen=True)
class Problem:
    """The arguments of all four losses."""

    image: Tensor
    text: Tensor
    image_ids: Tensor
    text_ids: Tensor
    scale: Tensor
    bias: Tensor
    margin: float = 0.2
    offset: int = 0
    both: bool = True

    @property
    def sides(self):
        return Sides(self.image, self.text, self.image_ids, self.text_ids, self.offset, self.both)


def problem(
    n, width, distinct, dtype=torch.float32, kind="random", *, scale=14.0, seed=0, **options
) -> Problem:
    """n rows as `problems.sides` makes them, with ids from that many images."""
    ids = image_ids(n, distinct, seed)
    image, text = sides(n, width, seed, kind, dtype)
    return Problem(image, text, ids, ids, torch.tensor([scale]), torch.tensor([-0.5 * scale]), **options)


def rows_of(whole: Problem, start: int, stop: int) -> Problem:
    """What a worker with these rows computes."""
    own = {"image": whole.image[start:stop], "image_ids": whole.image_ids[start:stop]}
    return replace(whole, **own, offset=start, both=False)


def ours(name: str, p: Problem, need=ALL) -> list[Tensor]:
    """Loss and gradients (image, text; scale; bias) under the upstream gradient GRAD, by the raw functions."""
    grad = torch.tensor(GRAD)
    if name == "hinge_max":
        loss, *winners = fused.hinge_max_forward(p.sides, p.margin)
        gradients = fused.hinge_max_backward(grad, p.image, p.text, Winners(*winners), p.offset, need[:2])
    elif name == "info_nce":
        loss, *odds = fused.info_nce_forward(p.sides, p.scale)
        gradients = fused.info_nce_backward(p.sides, p.scale, *odds, grad, need[:3])
    elif name == "hinge_sum":
        loss, *made = fused.hinge_sum_forward(p.sides, p.margin, need[:2])
        gradients = [(grad * g).to(p.image.dtype) for g in made]
    else:
        loss, *made = fused.sigmoid_forward(p.sides, p.scale, p.bias, need)
        gradients = [
            (grad * g).to(x.dtype) for g, x in zip(made, (p.image, p.text, p.scale, p.bias), strict=True)
        ]
    return [loss, *gradients]


def _differentiate(loss, leaves: list[Tensor]) -> list[Tensor]:
    gradients = torch.autograd.grad(loss, leaves, torch.tensor(GRAD, dtype=loss.dtype), allow_unused=True)
    return [loss.detach(), *(g for g in gradients if g is not None)]


def _leaves(p: Problem, dtype: torch.dtype | None) -> list[Tensor]:
    return [
        x.detach().clone().to(dtype or x.dtype).requires_grad_() for x in (p.image, p.text, p.scale, p.bias)
    ]


def exact(name: str, p: Problem) -> list[Tensor]:
    """The same by the oracle, in float64 throughout."""
    leaves = _leaves(p, torch.float64)
    image, text, scale, bias = leaves
    doubles = p.sides._replace(image=image, text=text)
    if name == "info_nce":
        loss = reference.info_nce_loss(doubles, scale)
    elif name == "sigmoid":
        loss = reference.sigmoid_loss(doubles, scale, bias)
    else:
        loss = reference.hinge_loss(doubles, p.margin, hardest=name == "hinge_max")
    return _differentiate(loss, leaves)


def dense(name: str, p: Problem) -> list[Tensor]:
    """The same by what one would write down, in the type of the embeddings."""
    leaves = _leaves(p, None)
    image, text, scale, bias = leaves
    s = image @ text.T
    positive = torch.arange(s.shape[1]) == torch.arange(s.shape[0])[:, None] + p.offset
    other = (p.image_ids[:, None] != p.text_ids) & ~positive
    if name == "info_nce":
        z = (scale.to(s.dtype) * s).masked_fill(~(positive | other), -torch.inf)
        loss = -sum(torch.log_softmax(z, d)[positive].sum() for d in (1, 0)[: 1 + p.both]) / 2
    elif name == "sigmoid":
        z = scale.to(s.dtype) * s + bias.to(s.dtype)
        cost = torch.nn.functional.softplus(torch.where(positive, -z, z))
        loss = torch.where(positive | other, cost, 0).sum()
    else:
        own = s[positive]
        costs = [(p.margin + s - m).clamp_min(0) for m in (own[:, None], own[None])[: 1 + p.both]]
        costs = [torch.where(other, c, 0) for c in costs]
        loss = sum(
            c.amax(d).sum() if name == "hinge_max" else c.sum() for d, c in zip((1, 0), costs, strict=False)
        )
    return _differentiate(loss, leaves)


def check(name: str, p: Problem) -> None:
    """Asserts the error rule for the loss and every gradient.

    Room is left for the last bit of a logit, and of a gradient's type (dS has that type, too). The gradient of a
    scale is a sum of as many differences of similarities as there are rows, which cancel.
    """
    room = 2e-6 + 2**-23 * float(p.scale.abs()) * (name in ("info_nce", "sigmoid"))
    results = ours(name, p), dense(name, p), exact(name, p)
    for k, (mine, plain, true) in enumerate(zip(*results, strict=True)):
        last_bit = torch.finfo(p.image.dtype).eps / 2 if k in (1, 2) and p.image.element_size() == 2 else 0
        least = 0.1 * len(p.image) if k > 2 else 1e-3
        assert_as_good(mine.reshape(true.shape), plain, true, eps=room + last_bit, least=least)
