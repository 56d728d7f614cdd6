"""The module that the DeepSpeed engine wraps. It contains the model and the objective."""

import torch
from torch import Tensor, nn

from d2s.data.batch import Batch
from d2s.losses.objective import Objective, at_least_fp32
from d2s.model import D2SModel


class TrainingModule(nn.Module):
    """Contains model and objective. Computes this worker's part of the losses from a batch.

    bf16: compute the embeddings under bf16 autocast. sample_draws: seed the dropout on the text tower's output for
    each sample, and not for the whole batch. Then micro-batches drop the same values as the whole batch.
    """

    def __init__(
        self, model: D2SModel, objective: Objective, *, bf16: bool, sample_draws: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self._bf16 = bf16
        self._sample_draws = sample_draws

    def forward(
        self, batch: Batch, warmup: float = 1.0, teacher: Tensor | None = None, *, embed_only: bool = False
    ) -> tuple[Tensor, ...]:
        """Returns this worker's part of total, align and distill, of shape (). Only `total` has a gradient.
        If `embed_only` is True, returns the inputs of the losses, with gradient: the image embeddings and the text
        embeddings, of shape (B, D), and the objective's scale and bias, of shape (1,), if it has them. warmup,
        teacher: see :meth:`Objective.losses`."""
        with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=self._bf16):
            image = self.model.forward_image(batch.images, batch.draw_seeds)
            seeds = batch.draw_seeds if self._sample_draws else None
            text = self.model.forward_text(batch.text_ids, batch.text_mask, draw_seeds=seeds).embedding
        text = nn.functional.normalize(at_least_fp32(text), dim=-1)
        if embed_only:
            # Return copies: the engine puts hooks on the outputs, which must not be the parameters themselves.
            return at_least_fp32(image), text, *(factor.clone() for factor in self.objective.factors())
        losses = self.objective(image, text, batch.image_ids, warmup=warmup, teacher=teacher)
        return losses.total, losses.align, losses.distill
