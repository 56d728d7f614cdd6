"""Maps the word pieces of texts to text embeddings, and to word features for the decoder."""

from typing import Self

import torch
from torch import Tensor, nn

from d2s.model.batch_norm import WordBatchNorm
from d2s.model.config import ModelConfig
from d2s.model.gpo import GPO
from d2s.model.sample_draws import dropout
from d2s.model.towers import build_tower, tower_width

_GROUP = 32  # number of texts that a frozen tower embeds at a time on a CPU


class WordMLP(nn.Module):
    """Applies an MLP to each word: linear map to D / 2 channels, norm, ReLU, linear map to D channels."""

    def __init__(self, hidden: int, config: ModelConfig) -> None:
        super().__init__()
        half = config.width // 2
        self.inner = nn.Linear(hidden, half)
        batch = config.text_mlp_norm == "batch"
        self.norm = WordBatchNorm(half) if batch else nn.LayerNorm(half)
        self.outer = nn.Linear(half, config.width)
        self.pads = batch and config.compat_batch_norm
        if self.pads:
            self.norm.across_workers = False

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Maps hidden states of shape (B, L, H) to shape (B, L, D). `mask` is false at padding."""
        inner = self.inner(hidden)
        flat = inner.flatten(0, 1)
        if self.pads or not (self.training and isinstance(self.norm, WordBatchNorm)):
            normed = self.norm(flat)
        else:
            real = mask.flatten().nonzero().squeeze(1)
            normed = torch.zeros_like(flat).index_copy(0, real, self.norm(flat[real]).to(flat.dtype))
        return self.outer(torch.relu(normed).view_as(inner))


class TextEncoder(nn.Module):
    """Embeds texts: tower, dropout, word features, pooling over all words but padding, LayerNorm."""

    def __init__(self, config: ModelConfig, vocab_size: int | None = None) -> None:
        super().__init__()
        self.frozen = config.text_encoder.freeze
        changes = {} if vocab_size is None else {"vocab_size": vocab_size}
        self.tower = build_tower(config.text_encoder, "text", **changes)
        hidden = tower_width(self.tower)
        self.dropout = nn.Dropout(config.text_dropout)
        self.linear = nn.Linear(hidden, config.width)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.mlp = WordMLP(hidden, config)
        self.pool = GPO(config.gpo_width, config.gpo_temperature)
        self.norm = nn.LayerNorm(config.width) if config.text_norm else nn.Identity()

    def train(self, mode: bool = True) -> Self:
        """Sets the mode. If the tower is frozen, the tower stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.tower.eval()
        return self

    def forward(self, ids: Tensor, mask: Tensor, draw_seeds: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns text embeddings t, of shape (B, D), and word features, of shape (B, L, D).

        The embeddings are not scaled to length 1.
        ids: numbers of word pieces, int64, of shape (B, L). mask: boolean, of shape (B, L), false at padding.
        draw_seeds: int64 seeds of shape (B,). In training, a seed decides the dropout of its text. If None,
            torch's generator decides.
        """
        hidden = self._frozen_hidden(ids, mask) if self.frozen else self._hidden(ids, mask)
        if draw_seeds is None or not self.training:
            hidden = self.dropout(hidden)
        else:
            hidden = dropout(hidden, draw_seeds, self.dropout.p)
        words = self.linear(hidden) + self.mlp(hidden, mask)
        return self.norm(self.pool(words, mask)), words

    def _hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.tower(input_ids=ids, attention_mask=mask.long()).last_hidden_state

    @torch.no_grad()
    def _frozen_hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Returns the tower's hidden states, of shape (B, L, H).

        A CPU spends as much time on padding as on words. So on a CPU the tower embeds groups of texts of
        similar length. Positions after a group's longest text stay 0 and are masked later.
        """
        if ids.device.type != "cpu" or len(ids) <= _GROUP:
            return self._hidden(ids, mask)
        lengths = mask.shape[1] - mask.flip(1).int().argmax(1)  # position of the last word, plus 1
        out: Tensor | None = None
        for rows in lengths.argsort(stable=True).split(_GROUP):
            width = int(lengths[rows].max())
            hidden = self._hidden(ids[rows, :width], mask[rows, :width])
            if out is None:
                out = hidden.new_zeros(*ids.shape, hidden.shape[2])
            out[rows, :width] = hidden
        return out
