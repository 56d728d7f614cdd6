"""The terms of the objective and their weights: the settings."""

from dataclasses import dataclass
from math import isfinite
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The terms of the objective and their weights, stated at a batch of 128 pairs."""

    align: Literal["hinge", "infonce", "sigmoid"] = "hinge"
    """The alignment loss: VSE++ hinge, symmetric InfoNCE, or SigLIP's sigmoid."""
    align_weight: float = 1.0
    """Weight of the alignment term; 0 leaves it out."""
    margin: float = 0.2
    """Margin of the hinge, in cosine similarity."""
    warmup_epochs: float = 1.0
    """Epochs of the hinge's sum form, its weight rising from 0 to 1; then the hardest negative alone."""
    logit_scale: float = 14.2857
    """Initial inverse temperature of InfoNCE and sigmoid; learned."""
    max_logit_scale: float = 100.0
    """Upper bound of the learned inverse temperature."""
    logit_bias: float = -10.0
    """Initial bias of the sigmoid loss; learned."""
    distill: Literal["cosine", "l1", "l2", "relational"] = "cosine"
    """How the sparse caption's embedding is drawn to the frozen dense caption's embedding."""
    distill_weight: float = 0.0
    """Weight of the distillation term; 0 leaves it out, and then no teacher is needed."""
    distill_temperature: float = 0.05
    """Temperature of the similarity rows in relational distillation."""
    teacher: Literal["cached", "online"] = "cached"
    """Teacher embeddings of the training split are computed once and stored in the run, or at every step."""
    exchange: Literal["gather", "ring"] = "gather"
    """How workers see each other's columns: all of them gathered on each worker, or a block at a time on its way
    around the ring, for global batches that a worker cannot hold; twice the transfers, the same values."""
    teacher_train_mode: bool = False
    """As the authors' release: the online teacher keeps its dropout on and its BatchNorm drifting."""

    def __post_init__(self) -> None:
        for name in ("align_weight", "distill_weight", "margin", "logit_bias", "max_logit_scale"):
            if not isfinite(getattr(self, name)):
                raise ValueError(f"loss.{name} is {getattr(self, name)}: it must be finite")
        for name in ("align_weight", "distill_weight", "warmup_epochs", "margin"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"loss.{name} is {getattr(self, name)}: it must be 0 or more")
        for name in ("logit_scale", "distill_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"loss.{name} is {getattr(self, name)}: it must be above 0")
        if self.teacher_train_mode and self.teacher == "cached":
            raise ValueError("loss.teacher_train_mode is on with loss.teacher 'cached': set it to 'online'")
        if self.logit_scale > self.max_logit_scale:
            raise ValueError(
                f"loss.logit_scale {self.logit_scale} is above loss.max_logit_scale {self.max_logit_scale}"
            )
        if not (self.align_weight or self.distill_weight):
            raise ValueError("loss.align_weight and loss.distill_weight are both 0: nothing would be learned")
