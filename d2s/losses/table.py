"""Maps the names of losses in the configuration to their classes."""

from d2s.losses.base import Alignment, Distillation, Loss
from d2s.losses.config import LossConfig
from d2s.losses.hinge import Hinge
from d2s.losses.info_nce import InfoNCE
from d2s.losses.pointwise import Pointwise
from d2s.losses.relational import Relational
from d2s.losses.sigmoid import Sigmoid

LOSSES: dict[str, type[Alignment]] = {"hinge": Hinge, "infonce": InfoNCE, "sigmoid": Sigmoid}
"""The alignment losses by their names in --loss.align."""
DISTILLATIONS: dict[str, type[Distillation]] = {
    "cosine": Pointwise,
    "l1": Pointwise,
    "l2": Pointwise,
    "relational": Relational,
}
"""The distillation losses by their names in --loss.distill."""


def losses_of(config: LossConfig) -> list[Loss]:
    """Returns the alignment and the distillation loss named in `config`, without any whose weight is 0."""
    both = [
        (config.align_weight, LOSSES[config.align]),
        (config.distill_weight, DISTILLATIONS[config.distill]),
    ]
    return [loss(config) for weight, loss in both if weight]
