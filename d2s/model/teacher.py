"""The teacher of stage 2: a frozen text encoder of stage 1. Its embedding of dense captions is distilled."""

import copy
from typing import Self

import torch
from torch import Tensor, nn

from d2s.model.text_encoder import TextEncoder


class Teacher(nn.Module):
    """A frozen copy of a text encoder that always stays in eval mode.

    With `train_mode=True` it stays in training mode, as in the authors' release, with changing statistics.
    """

    def __init__(self, text_encoder: TextEncoder, *, train_mode: bool = False) -> None:
        super().__init__()
        self.train_mode = train_mode
        self.text_encoder = copy.deepcopy(text_encoder).requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Self:
        """Keeps the mode chosen at construction and ignores `mode`."""
        return super().train(self.train_mode)

    @torch.no_grad()
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Returns the text embedding t (B, D), not of unit length, for ids and mask (B, L); no decoder."""
        return self.text_encoder(ids, mask)[0]
