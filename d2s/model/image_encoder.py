"""Maps the pixels of images to embeddings."""

from contextlib import nullcontext
from typing import Self

import torch
from torch import Tensor, nn

from d2s.model.config import ModelConfig
from d2s.model.gpo import GPO
from d2s.model.sample_draws import token_mask
from d2s.model.towers import build_tower, tower_width


class ImageEncoder(nn.Module):
    """Embeds images: tower, linear map, size augmentation, pooling, scaling to length 1."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.frozen = config.image_encoder.freeze
        self.tower = build_tower(config.image_encoder, "vision", image_size=config.image_size)
        self.linear = nn.Linear(tower_width(self.tower), config.width)
        # ConvNeXt applies its last norm after average pooling. Here the norm is applied to the tokens.
        self.map_norm = self.tower.config.model_type in ("convnext", "convnextv2")
        self.pool = GPO(config.gpo_width, config.gpo_temperature)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def train(self, mode: bool = True) -> Self:
        """Sets the mode. If the tower is frozen, the tower stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.tower.eval()
        return self

    def normalise(self, images: Tensor) -> Tensor:
        """Computes (x / 255 - mean) / std, in the weights' dtype, for uint8 images of shape (B, 3, H, W)."""
        dtype = self.linear.weight.dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        mean = torch.tensor(self.config.image_mean, dtype=wide, device=images.device).view(3, 1, 1)
        std = torch.tensor(self.config.image_std, dtype=wide, device=images.device).view(3, 1, 1)
        # addcmul makes one pass over the pixels instead of three.
        normal = torch.addcmul(-mean / std, images.to(wide), 1 / (255 * std)).to(dtype)
        # The small convolutional towers train 9 to 26 % faster on one CPU core with channels last.
        return normal.contiguous(memory_format=torch.channels_last)

    def tokens(self, images: Tensor) -> Tensor:
        """Maps uint8 images of shape (B, 3, H, W) to the tower's K tokens, of shape (B, K, C)."""
        with torch.no_grad() if self.frozen else nullcontext():
            out = self.tower(pixel_values=self.normalise(images)).last_hidden_state
        if out.ndim == 4:
            out = out.flatten(2).transpose(1, 2)
        return self.tower.layernorm(out) if self.map_norm else out

    def forward(self, images: Tensor, draw_seeds: Tensor | None = None) -> Tensor:
        """Embeds uint8 images of shape (B, 3, H, W). Returns unit-length embeddings of shape (B, D).

        draw_seeds: int64 seeds, one for each image. In training, a seed decides which tokens its image loses.
            If None, each image keeps all tokens.
        """
        tokens = self.tokens(images)
        if self.training and draw_seeds is not None and self.config.token_dropout > 0:
            mask = token_mask(draw_seeds, tokens.shape[1], self.config)
        else:
            mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return nn.functional.normalize(self.pool(self.linear(tokens), mask), dim=1)
