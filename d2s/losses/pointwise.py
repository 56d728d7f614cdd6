"""Distillation pair by pair: moves each sparse caption's embedding towards the embedding of its dense caption."""

from torch import Tensor

from d2s.kernels import functional as F
from d2s.losses.base import Distillation


class Pointwise(Distillation):
    """Distance between the sparse and the dense caption's embedding, summed over pairs. Workers exchange nothing.
    `config.distill` selects the distance: cosine, l1 or l2."""

    compares_pairs = False

    def value(self, text: Tensor, teacher: Tensor) -> Tensor:
        return F.pointwise_distillation(text, teacher, kind=self.config.distill)
