"""What every loss provides: values, ring rule, learned numbers, and its cost for `python -m d2s.plan`."""

from abc import ABC, abstractmethod
from math import log
from typing import NamedTuple

from torch import Tensor, nn

from d2s.losses.config import LossConfig


class Sides(NamedTuple):
    """Rows and columns of the similarities S = rows @ columns.T: the arguments of `d2s.kernels.functional`."""

    rows: Tensor
    """(B, D): images or captions of this worker."""
    columns: Tensor
    """(M, D): the other kind, of this worker or of all."""
    row_ids: Tensor
    """(B,) int64: images."""
    column_ids: Tensor | None = None
    """(M,) int64; None for columns that are the same pairs as the rows."""
    offset: int = 0
    """Column of the first row's positive."""
    both: bool = False
    """Add the opposite direction, columns against rows, from the same similarities."""


class Loss:
    """A term of the objective. Its value is a sum over rows, so the workers' values add up to the global batch's."""

    compares_pairs = True
    """Whether it learns from a pair's difference to the others of the batch: at a batch of 1 there are none."""
    gathered_sides = 0
    """Tensors of (N, D) that a worker holds when it gathers, gradients included."""

    def __init__(self, config: LossConfig) -> None:
        self.config = config

    def bytes_sent(self, workers: int, local: int, row: int) -> tuple[int, int]:
        """Bytes of embeddings and bytes of their gradients that one of several workers sends in a step.

        local: pairs of a worker. row: bytes of an embedding.
        """
        return 0, 0


class Alignment(Loss, ABC):
    """A loss on the similarities of images and captions. Other pairs of the same image never count as negatives."""

    one_way = False
    """One direction covers all pairs: local images against all captions. Otherwise both directions are added."""
    gathered_sides = 4  # both sides and their gradients

    def learned(self) -> dict[str, float]:
        """Initial values of the numbers that it learns, by their parameter names in checkpoints."""
        return {}

    def factors(self, parameters: nn.Module) -> tuple[Tensor, ...]:
        """What enters the loss beside the embeddings, (1,) each, computed from the learned numbers."""
        return ()

    def sparse_gradient(self, warmup: float) -> bool:
        """Whether most rows of the gathered sides get no gradient, so that only the others are sent back."""
        return False

    @abstractmethod
    def value(self, sides: Sides, factors: tuple[Tensor, ...], warmup: float) -> Tensor:
        """The loss of the rows against the columns, by `d2s.kernels.functional`: 0-dim, with gradient.

        factors: as :meth:`factors` returns them. warmup: progress of the hinge's warm-up, in [0, 1].
        """

    @abstractmethod
    def ring_value(self, sides: Sides, factors: tuple[Tensor, ...], warmup: float) -> Tensor:
        """The loss of the rows against all workers' columns around the ring; sides: this worker's pairs. 0-dim."""

    def bytes_sent(self, workers: int, local: int, row: int) -> tuple[int, int]:
        side = (workers - 1) * local * row
        columns = 1 if self.one_way else 2
        if self.config.exchange == "ring":
            # In the backward pass the columns travel again, with their gradients, which take one more hop home.
            return columns * side, columns * (2 * side + local * row)
        return 2 * side, columns * side


class ScaledAlignment(Alignment):
    """An alignment loss with a learned inverse temperature, the first of its factors."""

    def learned(self) -> dict[str, float]:
        return {"log_scale": log(self.config.logit_scale)}

    def factors(self, parameters: nn.Module) -> tuple[Tensor, ...]:
        return (parameters.log_scale.clamp(max=log(self.config.max_logit_scale)).exp(),)


class Distillation(Loss, ABC):
    """A loss that draws embeddings of sparse captions to the teacher's embeddings of dense ones."""

    @abstractmethod
    def value(self, text: Tensor, teacher: Tensor) -> Tensor:
        """The loss of this worker's captions (B, D); teacher (B, D) gets no gradient. 0-dim."""
