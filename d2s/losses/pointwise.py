"""Distillation pair by pair: moves the embedding of each sparse caption towards that of its dense caption."""

from torch import Tensor

from d2s.kernels import functional as F
from d2s.losses.base import Distillation


class Pointwise(Distillation):
    """Cosine, L1 or L2 distance (loss.distill) between the two embeddings of a pair. Workers exchange nothing."""

    compares_pairs = False

    def value(self, text: Tensor, teacher: Tensor) -> Tensor:
        return F.pointwise_distillation(text, teacher, kind=self.config.distill)
