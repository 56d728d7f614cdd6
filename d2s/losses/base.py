"""The base classes of the losses. They declare the methods that every loss must have."""

from abc import ABC, abstractmethod
from math import log
from typing import NamedTuple

from torch import Tensor, nn

from d2s.losses.config import LossConfig


class Sides(NamedTuple):
    """The inputs of an alignment loss, which compares B rows with M columns by the similarities rows @ columns.T.
    The rows are embeddings of images and the columns embeddings of captions, or the other way round."""

    rows: Tensor
    """Embeddings of this worker, of shape (B, D). D: the width of an embedding."""
    columns: Tensor
    """Embeddings of this worker or of all workers, of shape (M, D)."""
    row_ids: Tensor
    """The image id of each row. Type int64, shape (B,)."""
    column_ids: Tensor | None = None
    """The image id of each column. Type int64, shape (M,). None if the columns have the same ids as the rows."""
    offset: int = 0
    """The positive of row i, which belongs to the same pair, is column offset + i."""
    both: bool = False
    """Whether to add the loss of the opposite direction, columns against rows, from the same similarities."""


class Loss:
    """A term of the objective. The values that workers compute add up to the value for the global batch."""

    compares_pairs = True
    """Whether the loss compares different pairs of a batch. If so, it learns nothing from a batch of one pair."""
    gathered_sides = 0
    """A worker that gathers the embeddings of all workers holds this number of tensors with a row for each pair of
    the global batch. Gradients are counted too."""

    def __init__(self, config: LossConfig) -> None:
        self.config = config

    def bytes_sent(self, workers: int, local: int, row: int) -> tuple[int, int]:
        """Returns how many bytes a worker sends in a training step: of embeddings, and of their gradients.
        workers: number of workers, above 1. local: number of pairs of each worker. row: bytes of one embedding."""
        return 0, 0


class Alignment(Loss, ABC):
    """A loss on the similarities of images and captions.
    A positive is the image or caption of the same pair. All others with another image id are negatives."""

    one_way = False
    """True if the loss compares only this worker's images with all captions. False if it also compares this worker's
    captions with all images."""
    gathered_sides = 4  # images, captions, and the gradient of each

    def learned(self) -> dict[str, float]:
        """Returns the initial value of each number that the loss learns. The keys are parameter names."""
        return {}

    def factors(self, parameters: nn.Module) -> tuple[Tensor, ...]:
        """Returns the scale and the bias that the loss applies to similarities: neither, only the scale, or both.
        Both have shape (1,). parameters: a module that has the learned numbers of :meth:`learned` as attributes."""
        return ()

    def sparse_gradient(self, warmup: float) -> bool:
        """Returns True if the loss gives most gathered embeddings a zero gradient.
        If so, workers send each other only the nonzero gradients. warmup: as for :meth:`value`."""
        return False

    @abstractmethod
    def value(self, sides: Sides, factors: tuple[Tensor, ...], warmup: float) -> Tensor:
        """Returns the loss of the rows against the columns, of shape (), with gradient.
        factors: the result of :meth:`factors`. warmup: progress of the hinge's warm-up (`LossConfig.warmup_epochs`),
        from 0 to 1; other losses ignore it."""

    @abstractmethod
    def ring_value(self, sides: Sides, factors: tuple[Tensor, ...], warmup: float) -> Tensor:
        """Returns the loss of this worker's rows against the columns of all workers, of shape (), with gradient.
        `sides.columns` are this worker's columns. ring.py passes them on. Other arguments: see :meth:`value`."""

    def bytes_sent(self, workers: int, local: int, row: int) -> tuple[int, int]:
        side = (workers - 1) * local * row
        columns = 1 if self.one_way else 2
        if self.config.exchange == "ring":
            # The backward pass sends the columns again, with their gradients. The gradients take one more hop.
            return columns * side, columns * (2 * side + local * row)
        return 2 * side, columns * side


class ScaledAlignment(Alignment):
    """An alignment loss that multiplies similarities by a learned scale, the inverse of a temperature."""

    def learned(self) -> dict[str, float]:
        return {"log_scale": log(self.config.logit_scale)}

    def factors(self, parameters: nn.Module) -> tuple[Tensor, ...]:
        return (parameters.log_scale.clamp(max=log(self.config.max_logit_scale)).exp(),)


class Distillation(Loss, ABC):
    """A loss that moves embeddings of sparse captions towards the teacher's embeddings of dense captions."""

    @abstractmethod
    def value(self, text: Tensor, teacher: Tensor) -> Tensor:
        """Returns this worker's part of the loss, of shape (), with gradient.
        text: embeddings of this worker's sparse captions, of shape (B, D). teacher: the teacher's embeddings of the
        dense captions of the same pairs, of shape (B, D), without gradient."""
