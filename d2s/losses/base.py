"""What every loss provides: values, ring rule, learned numbers, and its cost for `python -m d2s.plan`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import log
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

if TYPE_CHECKING:
    from d2s.losses.config import LossConfig


class StepSizes(NamedTuple):
    """Sizes of a training step, from which a loss computes what it sends."""

    workers: int
    local: int
    """Pairs on each worker."""
    row_bytes: int
    """Bytes of one embedding."""
    ring: bool
    """Whether columns travel around the ring instead of being gathered."""

    @property
    def side_bytes(self) -> int:
        """Bytes that a worker sends until all workers have seen one side, images or captions."""
        return (self.workers - 1) * self.local * self.row_bytes

    @property
    def home_bytes(self) -> int:
        """Bytes of the last hop in a ring, which brings the columns' gradients home."""
        return self.local * self.row_bytes if self.ring else 0


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


class Alignment(ABC):
    """A loss on the similarities of images and captions. Other pairs of the same image never count as negatives.

    Every value is a sum over rows, so the values of all workers add up to the loss of the global batch.
    """

    one_way = False
    """One direction covers all pairs: local images against all captions. Otherwise both directions are added."""
    gathered_sides = 4
    """Tensors of (N, D) that a worker holds when it gathers: both sides and their gradients."""

    def __init__(self, config: LossConfig) -> None:
        self.config = config

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

    def bytes_sent(self, sizes: StepSizes) -> tuple[int, int]:
        """Bytes of embeddings and of gradients that a worker sends in a step."""
        columns = 1 if self.one_way else 2
        side = sizes.side_bytes
        if sizes.ring:  # the columns travel again in the backward pass, together with their gradients
            return columns * side, columns * (2 * side + sizes.home_bytes)
        return 2 * side, columns * side


class ScaledAlignment(Alignment):
    """An alignment loss with a learned inverse temperature, the first of its factors."""

    def learned(self) -> dict[str, float]:
        return {"log_scale": log(self.config.logit_scale)}

    def factors(self, parameters: nn.Module) -> tuple[Tensor, ...]:
        return (parameters.log_scale.clamp(max=log(self.config.max_logit_scale)).exp(),)


class Distillation(ABC):
    """A loss that draws embeddings of sparse captions to the teacher's embeddings of dense ones."""

    gathered_sides = 0
    """Tensors of (N, D) that a worker holds when it gathers."""

    def __init__(self, config: LossConfig) -> None:
        self.config = config

    @abstractmethod
    def value(self, text: Tensor, teacher: Tensor) -> Tensor:
        """The loss of this worker's captions (B, D); teacher (B, D) gets no gradient. 0-dim, a sum over rows."""

    def bytes_sent(self, sizes: StepSizes) -> tuple[int, int]:
        """Bytes of embeddings and of gradients that a worker sends in a step."""
        return 0, 0
