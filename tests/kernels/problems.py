"""Random problems for the losses, and one way to run them: value and every gradient."""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import normalize

from d2s.kernels import reference
from d2s.kernels.sides import Sides

CONTRASTIVE = ("hinge_max", "hinge_sum", "info_nce", "sigmoid")
KINDS = ("random", "clustered", "duplicated", "identical")


class Numbers:
    """Random tensors where tensors are made now, with the same numbers on every device: a CPU draws them."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def _drawn(self, draw: Callable, *arguments, **options) -> Tensor:
        drawn = draw(*arguments, generator=self._generator, device="cpu", **options)
        return drawn.to(torch.get_default_device())

    def randn(self, *shape, **options) -> Tensor:
        return self._drawn(torch.randn, *shape, **options)

    def rand(self, *shape, **options) -> Tensor:
        return self._drawn(torch.rand, *shape, **options)

    def randint(self, *bounds_and_shape) -> Tensor:
        return self._drawn(torch.randint, *bounds_and_shape)

    def randperm(self, n: int) -> Tensor:
        return self._drawn(torch.randperm, n)


def sides(n: int, width: int, seed: int, kind: str = "random", dtype: torch.dtype = torch.float64):
    """image, text (n, width), about L2-normalised: random, clustered, duplicated or nearly identical pairs."""
    g = Numbers(seed)
    image = g.randn(n, width, dtype=torch.float64)
    text = g.randn(n, width, dtype=torch.float64)
    if kind == "clustered":
        centre = g.randn(3, width, dtype=torch.float64)[torch.arange(n) % 3]
        image, text = centre + 0.1 * image, centre + 0.1 * text
    elif kind == "duplicated":
        image, text = image[torch.arange(n) // 2], text[torch.arange(n) // 2]
    elif kind == "identical":
        text = image + 1e-3 * text
    image, text = normalize(image, dim=1), normalize(text, dim=1)
    if kind == "duplicated":
        # Sixteenths: every similarity is exact, so equal ones are equal to the last bit whoever adds them up.
        image, text = (image * 16).round() / 16, (text * 16).round() / 16
    return image.to(dtype), text.to(dtype)


def image_ids(n: int, distinct: int, seed: int) -> Tensor:
    """(n,) int64: all different where distinct is n, else drawn from that many, with gaps and signs."""
    g = Numbers(seed)
    ids = g.randperm(n) if distinct >= n else g.randint(distinct, (n,))
    return ids * 1_000_003 - 7


def contrastive(
    module: ModuleType,
    name: str,
    image: Tensor,
    text: Tensor,
    ids: Tensor,
    text_ids: Tensor | None = None,
    *,
    margin: float = 0.2,
    scale: Tensor | float = 14.0,
    bias: Tensor | float = -7.0,
    offset: int = 0,
    both: bool = True,
) -> Tensor:
    """One of CONTRASTIVE, by its short name."""
    text_ids = ids if text_ids is None else text_ids
    if module is reference:
        both = both and name != "sigmoid"
        sides_ = Sides(image, text, ids, text_ids, offset, both)
        scale, bias = (torch.as_tensor(x, dtype=torch.float64) for x in (scale, bias))
        if name.startswith("hinge"):
            return reference.hinge_loss(sides_, margin, name == "hinge_max")
        if name == "info_nce":
            return reference.info_nce_loss(sides_, scale)
        return reference.sigmoid_loss(sides_, scale, bias)
    if name.startswith("hinge"):
        return module.hinge_loss(
            image, text, ids, text_ids, margin=margin, hardest=name == "hinge_max", offset=offset, both=both
        )
    if name == "info_nce":
        return module.info_nce_loss(image, text, ids, text_ids, scale=scale, offset=offset, both=both)
    return module.sigmoid_loss(image, text, ids, text_ids, scale=scale, bias=bias, offset=offset)


def value_and_gradients(function, *inputs: Tensor) -> list[Tensor]:
    """function's value and its gradient by every input, under an uneven upstream gradient."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    upstream = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).reshape(out.shape)
    gradients = torch.autograd.grad(out, leaves, upstream, allow_unused=True)
    return [
        out.detach(),
        *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)),
    ]


def worst(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference between two such lists, relative to the larger of 1 and the entry."""
    return max(
        float(((a - b).abs() / b.abs().clamp_min(1)).max())
        for a, b in zip(ours, theirs, strict=True)
        if a.numel()
    )
