"""Implements the decoder of stage 2. Its mask tokens stand for words that a sparse caption leaves out.

Source: Liu et al., ICCV 2025 (D2S-VSE), arXiv 2503.14953.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from d2s.model.config import DecoderConfig


class Attention(nn.Module):
    """Computes multi-head self-attention with an optional mask."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Lets each of K tokens attend to all tokens for which `mask` is true. Returns their new features.

        x: token features of shape (B, K, D). mask: boolean, of shape (B, 1, 1, K); None allows all tokens.
        """
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    """Applies a pre-norm transformer block: attention, then an MLP with GELU, each with a skip connection."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Maps token features to features of the same shape. Arguments: as in `Attention.forward`."""
        x = x + self.attn(self.norm1(x), mask)
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class Decoder(nn.Module):
    """Transforms word features and learnable mask tokens. The prompt p is the mean of the mask tokens.

    attend_padding: let tokens attend also to padding, as the authors' released code does.
    """

    def __init__(self, config: DecoderConfig, width: int, attend_padding: bool = False) -> None:
        super().__init__()
        self.attend_padding = attend_padding
        before = {"surround": config.tokens // 2, "prefix": config.tokens, "postfix": 0}
        self.before = before[config.layout]
        self.tokens = nn.Parameter(torch.empty(config.tokens, width))
        # Word features also have standard deviation 1. The prompt is a mean, so it starts small beside t.
        nn.init.normal_(self.tokens)
        hidden = int(width * config.mlp_ratio)
        self.blocks = nn.ModuleList(Block(width, config.heads, hidden) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        """Maps word features of shape (B, L, D) to prompts of shape (B, D). `mask` is false at padding."""
        batch, length = mask.shape
        tokens = self.tokens.to(words.dtype).expand(batch, -1, -1)
        x = torch.cat([tokens[:, : self.before], words, tokens[:, self.before :]], dim=1)
        allowed = None
        if not self.attend_padding:
            after = self.tokens.shape[0] - self.before
            allowed = nn.functional.pad(mask, (self.before, after), value=True)[:, None, None, :]
        for block in self.blocks:
            x = block(x, allowed)
        prompt = torch.cat([x[:, : self.before], x[:, self.before + length :]], dim=1)
        return self.norm(prompt).mean(1)
