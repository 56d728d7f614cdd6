"""The losses by their names in the configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from d2s.losses.base import Alignment, Distillation
from d2s.losses.hinge import Hinge
from d2s.losses.info_nce import InfoNCE
from d2s.losses.pointwise import Pointwise
from d2s.losses.relational import Relational
from d2s.losses.sigmoid import Sigmoid

if TYPE_CHECKING:
    from d2s.losses.config import LossConfig

LOSSES: dict[str, type[Alignment]] = {"hinge": Hinge, "infonce": InfoNCE, "sigmoid": Sigmoid}
"""Values of --loss.align."""
DISTILLATIONS: dict[str, type[Distillation]] = {
    "cosine": Pointwise,
    "l1": Pointwise,
    "l2": Pointwise,
    "relational": Relational,
}
"""Values of --loss.distill."""


def losses_of(config: LossConfig) -> list[Alignment | Distillation]:
    """The losses of a configuration whose weight is not 0."""
    align = [LOSSES[config.align](config)] if config.align_weight else []
    return [*align, *([DISTILLATIONS[config.distill](config)] if config.distill_weight else [])]
