"""The frozen text tower of stage 1, whose embedding of the dense caption is distilled in stage 2."""

import copy
from typing import Self

import torch
from torch import Tensor, nn

from d2s.model.text_encoder import TextEncoder


class Teacher(nn.Module):
    """A frozen copy of a text encoder that always stays in eval mode.

    `train_mode=True` follows the authors' release: always in training mode, with dropout and with running
    statistics that change.
    """

    def __init__(self, text_encoder: TextEncoder, *, train_mode: bool = False) -> None:
        super().__init__()
        self.train_mode = train_mode
        self.text_encoder = copy.deepcopy(text_encoder).requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Self:
        """Keep the mode set at construction, whatever `mode` says."""
        return super().train(self.train_mode)

    @torch.no_grad()
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Text embedding t (B, D), not of unit length, of ids (B, L) with mask (B, L); no decoder."""
        return self.text_encoder(ids, mask)[0]
