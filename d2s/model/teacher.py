"""Defines the teacher of stage 2, a frozen text encoder of stage 1. It embeds dense captions."""

import copy
from typing import Self

import torch
from torch import Tensor, nn

from d2s.model.text_encoder import TextEncoder


class Teacher(nn.Module):
    """Holds a frozen copy of a text encoder. The copy always stays in eval mode.

    With `train_mode=True`, the copy stays in training mode, and its BatchNorm statistics change.
    """

    def __init__(self, text_encoder: TextEncoder, *, train_mode: bool = False) -> None:
        super().__init__()
        self.train_mode = train_mode
        self.text_encoder = copy.deepcopy(text_encoder).requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Self:
        """Ignores `mode` and keeps the mode that was chosen at construction."""
        return super().train(self.train_mode)

    @torch.no_grad()
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Returns text embeddings t, of shape (B, D). See `TextEncoder.forward` for `ids` and `mask`."""
        return self.text_encoder(ids, mask)[0]
