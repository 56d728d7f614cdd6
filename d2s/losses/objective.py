"""What is minimised: alignment of images with captions, plus distillation of the dense caption's embedding.

Every term is a sum over the global batch of N pairs, and the total is stated at a reference batch of 128, the
paper's:

    loss = 128 / N * (align_weight * align + distill_weight / 128 * distill)

so that at N = 128 it is the paper's `align + distill` (a sum and a mean), and the ratio of the two terms and
the meaning of a clipping norm stay the same at any batch size and any number of workers.

Each worker computes its share (its rows against the columns of all workers, gathered or handed around the ring);
the shares add up to the loss, and the columns carry gradient home. An engine that averages gradients over W
workers therefore needs W times the share.
"""

from math import log
from typing import NamedTuple

import torch
from torch import Tensor, nn

from d2s.kernels import functional as F
from d2s.losses import ring
from d2s.losses.config import LossConfig
from d2s.workers.exchange import gather_rows, rank, world_size
from d2s.workers.group import all_gather

REFERENCE_BATCH = 128


class Losses(NamedTuple):
    """This worker's share of the total (0-dim, with gradient) and of its terms (0-dim, detached).

    A tuple, because ZeRO 3 looks there for what it has to fetch parameters before the backward of.
    """

    total: Tensor
    align: Tensor
    distill: Tensor


class Objective(nn.Module):
    """The loss of `config`, with its temperature and bias (of shape (1,): DeepSpeed fails on 0-dim ones)."""

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.config = config
        if config.align in ("infonce", "sigmoid"):
            self.log_scale = nn.Parameter(torch.tensor([log(config.logit_scale)]))
        if config.align == "sigmoid":
            self.logit_bias = nn.Parameter(torch.tensor([config.logit_bias]))

    def scale(self) -> Tensor:
        """The inverse temperature, shape (1,), bounded above."""
        return self.log_scale.clamp(max=log(self.config.max_logit_scale)).exp()

    def factors(self) -> tuple[Tensor, ...]:
        """What the loss depends on beside the embeddings, (1,) each: the scale, or the scale and the bias."""
        if self.config.align == "hinge":
            return ()
        return (self.scale(), self.logit_bias) if self.config.align == "sigmoid" else (self.scale(),)

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        image_ids: Tensor,
        *,
        warmup: float = 1.0,
        teacher: Tensor | None = None,
    ) -> Losses:
        """This worker's share of the loss, with the present scale and bias; see :meth:`losses`."""
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
        """This worker's share of the loss: a function of its arguments, which reads no parameter.

        image, text: (B, D), L2-normalised, the local rows, pair i in row i. image_ids: (B,) int64. factors: what
        :meth:`factors` gives. warmup: how far the sum form of the hinge has come, in [0, 1]; from 1 on the hardest
        negative alone counts. teacher: (B, D), the frozen embedding of each pair's dense caption; needed where
        distill_weight > 0.
        """
        image, text = at_least_fp32(image), at_least_fp32(text)
        pairs = image.shape[0] * world_size()
        zero = text.new_zeros(())
        align = self._align(image, text, image_ids, warmup, factors) if self.config.align_weight else zero
        distill = zero
        if self.config.distill_weight:
            assert teacher is not None, "distillation without teacher embeddings"
            distill = self._distill(text, at_least_fp32(teacher))
        total = REFERENCE_BATCH / pairs * self.config.align_weight * align
        total = total + self.config.distill_weight / pairs * distill
        return Losses(total, align.detach(), distill.detach())

    def _align(
        self, image: Tensor, text: Tensor, ids: Tensor, warmup: float, factors: tuple[Tensor, ...]
    ) -> Tensor:
        if world_size() == 1:
            return self._align_loss(image, text, ids, None, warmup, factors, both=True)
        # Rows of either side against the other side of all workers: each row of either direction on one worker only.
        one_way = self.config.align == "sigmoid"
        if self.config.exchange == "ring":
            loss = self._ring_loss(image, text, ids, warmup, factors)
            return loss if one_way else loss + self._ring_loss(text, image, ids, warmup, factors)
        # The hardest negatives are few: of the gathered side's gradient only their rows travel back.
        sparse = self.config.align == "hinge" and warmup >= 1
        all_image, all_text = gather_rows(image, sparse=sparse), gather_rows(text, sparse=sparse)
        all_ids, offset = all_gather(ids), rank() * image.shape[0]
        loss = self._align_loss(image, all_text, ids, all_ids, warmup, factors, both=False, offset=offset)
        if one_way:
            return loss
        return loss + self._align_loss(
            text, all_image, ids, all_ids, warmup, factors, both=False, offset=offset
        )

    def _align_loss(
        self,
        rows: Tensor,
        columns: Tensor,
        row_ids: Tensor,
        column_ids: Tensor | None,
        warmup: float,
        factors: tuple[Tensor, ...],
        *,
        both: bool,
        offset: int = 0,
    ) -> Tensor:
        config = self.config
        if config.align == "hinge":
            hardest = warmup >= 1
            loss = F.hinge_loss(
                rows, columns, row_ids, column_ids,
                margin=config.margin, hardest=hardest, offset=offset, both=both,
            )  # fmt: skip
            return loss if hardest else warmup * loss
        if config.align == "infonce":
            return F.info_nce_loss(
                rows, columns, row_ids, column_ids, scale=factors[0], offset=offset, both=both
            )
        scale, bias = factors
        return F.sigmoid_loss(rows, columns, row_ids, column_ids, scale=scale, bias=bias, offset=offset)

    def _ring_loss(
        self, rows: Tensor, columns: Tensor, ids: Tensor, warmup: float, factors: tuple[Tensor, ...]
    ) -> Tensor:
        margin = self.config.margin
        if self.config.align == "hinge":
            if warmup >= 1:
                return ring.ring_hinge_max(rows, columns, ids, margin)
            return warmup * ring.ring_loss(ring.HingeSum(margin), rows, columns, ids)
        rule = ring.InfoNCE() if self.config.align == "infonce" else ring.Sigmoid()
        return ring.ring_loss(rule, rows, columns, ids, *factors)

    def _distill(self, text: Tensor, teacher: Tensor) -> Tensor:
        if self.config.distill != "relational":
            return F.pointwise_distillation(text, teacher, kind=self.config.distill)
        temperature = self.config.distill_temperature
        if self.config.exchange == "ring" and world_size() > 1:
            return ring.ring_relational(text, torch.nn.functional.normalize(teacher, dim=-1), temperature)
        return F.relational_distillation(
            text,
            torch.nn.functional.normalize(teacher, dim=-1),
            gather_rows(text),
            torch.nn.functional.normalize(all_gather(teacher), dim=-1),
            temperature=temperature,
        )


def at_least_fp32(rows: Tensor) -> Tensor:
    """float64 stays, everything else is float32."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))
