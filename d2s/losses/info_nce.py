"""Symmetric InfoNCE with a learned temperature (CLIP, Radford et al. 2021)."""

import torch
from torch import Tensor

from d2s.kernels import functional as F
from d2s.losses.base import ScaledAlignment, Sides
from d2s.losses.ring import Chunk, RunningLogSumExp, ring_loss


class InfoNCE(ScaledAlignment):
    """Half the cross entropy of the logits scale * S, summed over rows and both directions. S: the similarities."""

    def value(self, sides: Sides, factors: tuple[Tensor, ...], warmup: float) -> Tensor:
        (scale,) = factors
        return F.info_nce_loss(*sides[:4], scale=scale, offset=sides.offset, both=sides.both)

    def ring_value(self, sides: Sides, factors: tuple[Tensor, ...], warmup: float) -> Tensor:
        return ring_loss(_Rule(), *sides[:3], *factors)


class _Rule:
    """The ring rule (:class:`d2s.losses.ring.RingRule`) of InfoNCE.
    The loss of a row is 0.5 * (log-sum-exp of its logits - logit of its positive)."""

    def start(self, positive: Tensor, scale: Tensor) -> None:
        self.scale, self.positive = scale, positive * scale
        self.lse = RunningLogSumExp(positive)

    def fold(self, chunk: Chunk) -> None:
        self.lse.fold(self._logits(chunk), chunk.part)

    def _logits(self, chunk: Chunk) -> Tensor:
        logits = (chunk.s * self.scale).masked_fill_(chunk.same_image, -torch.inf)
        if chunk.own:
            chunk.diagonal(logits).copy_(self.positive[chunk.part])
        return logits

    def loss(self) -> Tensor:
        return 0.5 * (self.lse.value() - self.positive).sum()

    def slope(self, chunk: Chunk) -> Tensor:
        slope = self._logits(chunk).sub_(self.lse.value()[chunk.part, None]).exp_().mul_(0.5)
        if chunk.own:
            chunk.diagonal(slope).sub_(0.5)
        return slope
