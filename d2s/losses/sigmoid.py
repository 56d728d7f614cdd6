"""SigLIP's sigmoid loss with a learned temperature and bias (Zhai et al. 2023)."""

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from d2s.kernels import functional as F
from d2s.losses.base import ScaledAlignment, Sides
from d2s.losses.ring import Chunk, ring_loss

_EXACT = 60.0
"""For x above this number, log(1 + exp(x)) equals x, even in float64."""


class Sigmoid(ScaledAlignment):
    """Sums log(1 + exp(-y * (scale * S + bias))) over all pairs of an image and a caption.
    S is the similarity of the pair. y is 1 for a positive and -1 for a negative."""

    one_way = True

    def learned(self) -> dict[str, float]:
        return {**super().learned(), "logit_bias": self.config.logit_bias}

    def factors(self, parameters: nn.Module) -> tuple[Tensor, ...]:
        return (*super().factors(parameters), parameters.logit_bias)

    def value(self, sides: Sides, factors: tuple[Tensor, ...], warmup: float) -> Tensor:
        scale, bias = factors
        return F.sigmoid_loss(*sides[:4], scale=scale, bias=bias, offset=sides.offset)

    def ring_value(self, sides: Sides, factors: tuple[Tensor, ...], warmup: float) -> Tensor:
        return ring_loss(_Rule(), *sides[:3], *factors)


class _Rule:
    """The ring rule (:class:`d2s.losses.ring.RingRule`) of the sigmoid loss.
    `start` computes the loss of the positives. `fold` adds the loss of the negatives in a chunk."""

    def start(self, positive: Tensor, scale: Tensor, bias: Tensor) -> None:
        self.scale, self.bias = scale, bias
        self.positive = positive * scale + bias
        self.cost = softplus(-self.positive, threshold=_EXACT).sum()

    def fold(self, chunk: Chunk) -> None:
        self.cost += softplus(self._logits(chunk), threshold=_EXACT).sum()

    def _logits(self, chunk: Chunk) -> Tensor:
        return (chunk.s * self.scale).add_(self.bias).masked_fill_(chunk.same_image, -torch.inf)

    def loss(self) -> Tensor:
        return self.cost

    def slope(self, chunk: Chunk) -> Tensor:
        slope = self._logits(chunk).sigmoid_()
        if chunk.own:
            chunk.diagonal(slope).sub_(torch.sigmoid(-self.positive[chunk.part]))
        return slope
