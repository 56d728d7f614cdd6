"""The module that the engine wraps: model and objective."""

import torch
from torch import Tensor, nn

from d2s.data.batch import Batch
from d2s.losses.objective import Objective, at_least_fp32
from d2s.model import D2SModel


class TrainingModule(nn.Module):
    """Model and objective in one module: takes a batch, returns this worker's share of the losses.

    bf16: compute the embeddings under autocast. sample_draws: dropout on the text tower's output follows from each
    sample's seed instead of its place in the batch, so that micro-batches drop the same values as the whole batch.
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
        """Returns total (with gradient), align and distill (0-dim); see :class:`d2s.losses.objective.Objective`.

        With embed_only it returns what the losses depend on: image (B, D), text (B, D) and each of the objective's
        factors (1,), all with gradient.
        """
        with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=self._bf16):
            image = self.model.forward_image(batch.images, batch.draw_seeds)
            seeds = batch.draw_seeds if self._sample_draws else None
            text = self.model.forward_text(batch.text_ids, batch.text_mask, draw_seeds=seeds).embedding
        text = nn.functional.normalize(at_least_fp32(text), dim=-1)
        if embed_only:
            # Copies, because the engine puts hooks on the outputs, which may not be its own parameters.
            return at_least_fp32(image), text, *(factor.clone() for factor in self.objective.factors())
        losses = self.objective(image, text, batch.image_ids, warmup=warmup, teacher=teacher)
        return losses.total, losses.align, losses.distill
