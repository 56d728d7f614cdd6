"""The base classes of the losses. They declare the methods that every loss must have."""

from abc import ABC, abstractmethod
from math import log
from typing import NamedTuple

from torch import Tensor, nn

from d2s.losses.config import LossConfig


class Sides(NamedTuple):
    """The inputs of an alignment loss, which compares rows with columns by the similarities S = rows @ columns.T."""

    rows: Tensor
    """(B, D): embeddings of this worker's images, or of its captions."""
    columns: Tensor
    """(M, D): embeddings of captions if the rows are images, else of images; from this worker or from all workers."""
    row_ids: Tensor
    """(B,) int64: the image id of each row."""
    column_ids: Tensor | None = None
    """(M,) int64: the image id of each column; None if the columns have the same ids as the rows."""
    offset: int = 0
    """Index of the column that is the positive of row 0; row i has its positive at column offset + i."""
    both: bool = False
    """Whether to add the loss of the opposite direction, columns against rows, from the same similarities."""


class Loss:
    """A term of the objective. Its values on all workers add up to its value for the global batch."""

    compares_pairs = True
    """Whether it learns from a pair's difference to the others of the batch: at a batch of 1 there are none."""
    gathered_sides = 0
    """How many (N, D) tensors a worker holds if it gathers the embeddings of all workers; gradients count too."""

    def __init__(self, config: LossConfig) -> None:
        self.config = config

    def bytes_sent(self, workers: int, local: int, row: int) -> tuple[int, int]:
        """Returns how many bytes of embeddings, and of their gradients, a worker sends in a training step.

        workers: number of workers, above 1. local: pairs of a worker. row: bytes of an embedding.
        """
        return 0, 0


class Alignment(Loss, ABC):
    """A loss on the similarities of images and captions. Captions of an image are never its negatives."""

    one_way = False
    """Whether the loss compares only local images with all captions, and not also local captions with all images."""
    gathered_sides = 4  # images, captions, and the gradient of each

    def learned(self) -> dict[str, float]:
        """Returns the initial values of the numbers that the loss learns, by their parameter names in checkpoints."""
        return {}

    def factors(self, parameters: nn.Module) -> tuple[Tensor, ...]:
        """Returns the scale and the bias of the similarities, (1,) each: none, only the scale, or both.

        parameters: a module with the learned numbers as attributes, from which scale and bias are computed.
        """
        return ()

    def sparse_gradient(self, warmup: float) -> bool:
        """Returns whether most gathered rows have a zero gradient; then only the other rows' gradients are sent."""
        return False

    @abstractmethod
    def value(self, sides: Sides, factors: tuple[Tensor, ...], warmup: float) -> Tensor:
        """Returns the loss of the rows against the columns, 0-dim, with gradient.

        factors: as :meth:`factors` returns them. warmup: progress of the hinge's warm-up, in [0, 1].
        """

    @abstractmethod
    def ring_value(self, sides: Sides, factors: tuple[Tensor, ...], warmup: float) -> Tensor:
        """Returns the loss of this worker's rows against the columns of all workers, which come around the ring."""

    def bytes_sent(self, workers: int, local: int, row: int) -> tuple[int, int]:
        side = (workers - 1) * local * row
        columns = 1 if self.one_way else 2
        if self.config.exchange == "ring":
            # The backward pass sends the columns again, with their gradients, which take one more hop to their owner.
            return columns * side, columns * (2 * side + local * row)
        return 2 * side, columns * side


class ScaledAlignment(Alignment):
    """An alignment loss that learns an inverse temperature (scale). The scale is the first of its factors."""

    def learned(self) -> dict[str, float]:
        return {"log_scale": log(self.config.logit_scale)}

    def factors(self, parameters: nn.Module) -> tuple[Tensor, ...]:
        return (parameters.log_scale.clamp(max=log(self.config.max_logit_scale)).exp(),)


class Distillation(Loss, ABC):
    """A loss that moves embeddings of sparse captions towards the teacher's embeddings of dense captions."""

    @abstractmethod
    def value(self, text: Tensor, teacher: Tensor) -> Tensor:
        """Returns the loss, 0-dim. text: (B, D), this worker's sparse captions. teacher: (B, D), without gradient."""
