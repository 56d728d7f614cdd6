"""The frozen text tower of stage 1, whose embedding of the dense caption is distilled in stage 2."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from d2s.model.text_encoder import TextEncoder


class Teacher(nn.Module):
    """A frozen copy of a text encoder. It stays in eval mode whatever is asked of it, unless `train_mode`.

    `train_mode=True` is the authors' release: dropout on and BatchNorm drifting.
    """

    def __init__(self, text_encoder: TextEncoder, *, train_mode: bool = False) -> None:
        super().__init__()
        self.train_mode = train_mode
        self.text_encoder = copy.deepcopy(text_encoder).requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Teacher:
        """Has no effect: the teacher does not learn."""
        return super().train(self.train_mode)

    @torch.no_grad()
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embedding t (B, D) of ids (B, L), not of unit length, without the decoder."""
        return self.text_encoder(ids, mask)[0]
