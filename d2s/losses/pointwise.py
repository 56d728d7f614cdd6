"""Distillation pair by pair: each sparse caption's embedding is drawn to its own dense caption's."""

from torch import Tensor

from d2s.kernels import functional as F
from d2s.losses.base import Distillation


class Pointwise(Distillation):
    """Cosine, L1 or L2 distance between the embeddings of a pair, as loss.distill says. Nothing is exchanged."""

    compares_pairs = False

    def value(self, text: Tensor, teacher: Tensor) -> Tensor:
        return F.pointwise_distillation(text, teacher, kind=self.config.distill)
