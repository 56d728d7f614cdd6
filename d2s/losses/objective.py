"""The loss that is minimised: alignment of images with captions, plus distillation from dense to sparse captions.

`align` and `distill` are sums over the global batch of N pairs. The weights are meant for the paper's batch of 128:

    loss = 128 / N * (align_weight * align + distill_weight / 128 * distill)

At N = 128 and weights of 1 this is the paper's loss: the sum of `align` plus the mean of `distill`. The factor
128 / N keeps two things the same for any batch size: the ratio of the terms, and the effect of a clipping norm.

Each worker computes the loss of its own rows against the columns of all workers. These parts add up to the loss of
the global batch, and each part sends gradients to the columns of every worker. An engine that averages gradients over
W workers must therefore get W times this worker's part.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from d2s.losses.base import Sides
from d2s.losses.config import LossConfig
from d2s.losses.table import DISTILLATIONS, LOSSES
from d2s.workers.collectives import all_gather
from d2s.workers.exchange import gather_rows
from d2s.workers.group import rank, several_workers, world_size

REFERENCE_BATCH = 128


class Losses(NamedTuple):
    """This worker's part of the total loss, with gradient, and of its two terms, without gradient. All of shape ().
    This class must be a tuple: ZeRO 3 searches a module's output for tensors with a gradient, but only in tuples."""

    total: Tensor
    align: Tensor
    distill: Tensor


class Objective(nn.Module):
    """Computes the loss that `config` describes. Its parameters are the numbers that the alignment loss learns.
    Each parameter has shape (1,), because DeepSpeed fails on 0-dim parameters."""

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.config = config
        self.alignment = LOSSES[config.align](config)
        self.distillation = DISTILLATIONS[config.distill](config)
        for name, value in self.alignment.learned().items():
            self.register_parameter(name, nn.Parameter(torch.tensor([value])))

    def factors(self) -> tuple[Tensor, ...]:
        """Returns the current scale and bias of the similarities; see :meth:`Alignment.factors`."""
        return self.alignment.factors(self)

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        image_ids: Tensor,
        *,
        warmup: float = 1.0,
        teacher: Tensor | None = None,
    ) -> Losses:
        """Returns this worker's part of the loss, with the current scale and bias. Arguments: see :meth:`losses`."""
        return self.losses(image, text, image_ids, self.factors(), warmup=warmup, teacher=teacher)

    def losses(
        self,
        image: Tensor,
        text: Tensor,
        image_ids: Tensor,
        factors: tuple[Tensor, ...],
        *,
        warmup: float = 1.0,
        teacher: Tensor | None = None,
    ) -> Losses:
        """Returns this worker's part of the loss. The result depends on the arguments only, not on parameters.
        image, text: L2-normalised embeddings of this worker's pairs, of shape (B, D). image_ids: int64, shape (B,).
        factors: the result of :meth:`factors`. warmup: progress of the hinge's warm-up, from 0 to 1; see `Hinge`.
        teacher: the teacher's embeddings of the dense captions, of shape (B, D); needed if distill_weight > 0."""
        image, text = at_least_fp32(image), at_least_fp32(text)
        pairs = image.shape[0] * world_size()
        align = distill = text.new_zeros(())
        if self.config.align_weight:
            align = self._align(image, text, image_ids, factors, warmup)
        if self.config.distill_weight:
            assert teacher is not None, "distillation without teacher embeddings"
            distill = self.distillation.value(text, at_least_fp32(teacher))
        total = REFERENCE_BATCH / pairs * self.config.align_weight * align
        total = total + self.config.distill_weight / pairs * distill
        return Losses(total, align.detach(), distill.detach())

    def _align(
        self, image: Tensor, text: Tensor, ids: Tensor, factors: tuple[Tensor, ...], warmup: float
    ) -> Tensor:
        """Returns the loss of local images against all captions, plus the loss of local captions against all images.
        A loss with `one_way` has only the first term. Arguments: see :meth:`losses`."""
        loss = self.alignment
        if not several_workers():
            return loss.value(Sides(image, text, ids, both=True), factors, warmup)
        if self.config.exchange == "ring":
            value, directions = loss.ring_value, (Sides(image, text, ids), Sides(text, image, ids))
        else:
            sparse = loss.sparse_gradient(warmup)
            all_image, all_text = gather_rows(image, sparse=sparse), gather_rows(text, sparse=sparse)
            all_ids, first = all_gather(ids), rank() * image.shape[0]
            value = loss.value
            directions = (
                Sides(image, all_text, ids, all_ids, first), Sides(text, all_image, ids, all_ids, first)
            )  # fmt: skip
        total = value(directions[0], factors, warmup)
        return total if loss.one_way else total + value(directions[1], factors, warmup)


def at_least_fp32(rows: Tensor) -> Tensor:
    """Returns `rows` as float32, or unchanged if they are float64."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))
