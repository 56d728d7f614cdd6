"""Settings of the objective: its terms and their weights."""

from typing import Literal

from pydantic import NonNegativeFloat, PositiveFloat

from d2s.common.settings import Settings, settings


@settings("loss")
class LossConfig(Settings):
    """The terms of the objective, and their weights for a batch of 128 pairs."""

    align: Literal["hinge", "infonce", "sigmoid"] = "hinge"
    """The alignment loss: VSE++ hinge, symmetric InfoNCE, or SigLIP's sigmoid."""
    align_weight: NonNegativeFloat = 1.0
    """Weight of the alignment term; 0 leaves the term out."""
    margin: NonNegativeFloat = 0.2
    """Margin of the hinge, in cosine similarity."""
    warmup_epochs: NonNegativeFloat = 1.0
    """Number of warm-up epochs, in which the hinge sums over all negatives with a weight that rises from 0 to 1.
    Afterwards only the hardest (most similar) negative counts."""
    logit_scale: PositiveFloat = 14.2857
    """Initial value of the inverse temperature that InfoNCE and sigmoid learn."""
    max_logit_scale: float = 100.0
    """Upper bound of the learned inverse temperature."""
    logit_bias: float = -10.0
    """Initial value of the bias that the sigmoid loss learns."""
    distill: Literal["cosine", "l1", "l2", "relational"] = "cosine"
    """The distillation loss. cosine, l1, l2: the distance between the embeddings of an image's sparse and dense
    caption. relational: the difference between similarities among sparse and similarities among dense captions."""
    distill_weight: NonNegativeFloat = 0.0
    """Weight of the distillation term; 0 leaves the term out, so that no teacher is needed."""
    distill_temperature: PositiveFloat = 0.05
    """Temperature of the softmax over similarities in relational distillation."""
    teacher: Literal["cached", "online"] = "cached"
    """cached: compute the teacher's embeddings once and store them in the run folder. online: compute them in every
    training step."""
    exchange: Literal["gather", "ring"] = "gather"
    """How a worker gets the embeddings of other workers. gather: all at once. ring: from one worker at a time, for
    a global batch that is too large for one worker. The loss is the same. The ring transfers about twice as much."""
    teacher_train_mode: bool = False
    """Keep dropout on in the online teacher, and update its BatchNorm statistics, as the authors' code does."""

    def __post_init__(self) -> None:
        if self.teacher_train_mode and self.teacher == "cached":
            raise ValueError("loss.teacher_train_mode is on with loss.teacher 'cached': set it to 'online'")
        if self.logit_scale > self.max_logit_scale:
            raise ValueError(
                f"loss.logit_scale {self.logit_scale} is above loss.max_logit_scale {self.max_logit_scale}: "
                "lower it, or raise the maximum"
            )
        if not (self.align_weight or self.distill_weight):
            raise ValueError(
                "loss.align_weight and loss.distill_weight are both 0: nothing would be learned; raise one"
            )
