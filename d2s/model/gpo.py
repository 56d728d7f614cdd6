"""Implements the generalised pooling operator (GPO).

GPO sorts each channel over the tokens and takes a weighted sum. Its weights depend on the token count only.

Source: Chen et al., "Learning the Best Pooling Strategy for Visual Semantic Embedding", CVPR 2021.
"""

import math
from functools import lru_cache
from typing import Self

import torch
from torch import Tensor, nn

from d2s.kernels import gpo_pool
from d2s.kernels.gru import position_gru

DIRECTIONS = ("ahead", "back")
GRU_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


@lru_cache(maxsize=64)
def position_code(length: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Returns position codes of shape (length, width): sines in even channels, cosines in odd channels."""
    position = torch.arange(length, dtype=torch.float64)[:, None]
    rate = torch.exp(torch.arange(0, width, 2, dtype=torch.float64) * (-math.log(10000.0) / width))
    code = torch.stack([torch.sin(position * rate), torch.cos(position * rate)], dim=2)
    return code.flatten(1).to(device=device, dtype=dtype)


class LengthWeights(nn.Module):
    """Computes pooling weights from lengths: bidirectional GRU over positions, linear score, softmax.

    The forward GRU runs only over the longest sequence, because its first states are also the states of
    shorter ones. The backward GRU runs over each sequence, because its states depend on the sequence's end.
    This module has no submodules, because ZeRO 3 gathers only parameters of the module whose forward runs.
    """

    def __init__(self, width: int, temperature: float) -> None:
        super().__init__()
        self.width = width
        self.temperature = temperature
        for name in DIRECTIONS:
            # The parameters get the shapes, names and initial values that torch.nn.GRU uses.
            for key, value in nn.GRU(width, width).named_parameters():
                self.register_parameter(f"{name}_{key.removesuffix('_l0')}", nn.Parameter(value.detach()))
        self.score = nn.Parameter(nn.Linear(width, 1, bias=False).weight.detach())

    def _gru(self, name: str, data: Tensor, counts: list[int]) -> Tensor:
        """Runs the GRU called `name` ("ahead" or "back"). See `position_gru` for arguments and result."""
        weights = [getattr(self, f"{name}_{key}").to(data.dtype) for key in GRU_WEIGHTS]
        return position_gru(data, counts, *weights)

    def forward(self, lengths: list[int]) -> Tensor:
        """Returns a row of pooling weights for each length. `lengths` must be distinct, longest first.

        A row has max(lengths) entries. The entries after the row's length are 0. The rows are float64 if the
        parameters are float64, and float32 otherwise.
        """
        assert lengths == sorted(set(lengths), reverse=True), "distinct lengths, longest first"
        assert lengths[-1] >= 1, "nothing to pool"
        dtype = torch.float64 if self.score.dtype == torch.float64 else torch.float32
        device = self.score.device
        with torch.autocast(device.type, enabled=False):
            code = position_code(lengths[0], self.width, device, dtype)
            ahead = self._gru("ahead", code, [1] * lengths[0])
            sizes = torch.tensor(lengths)
            inside = torch.arange(lengths[0])[:, None] < sizes
            back = self._gru("back", code.flip(0), inside.sum(1).flip(0).tolist()).flip(0)
            features = (ahead + back) / 2
            score = (features @ self.score.to(dtype).squeeze(0)) / self.temperature
            return score.masked_fill(~inside.to(device), -torch.inf).softmax(dim=0).t()


class GPO(nn.Module):
    """Pools token features by the generalised pooling operator.

    Each distinct length in a batch needs one row of weights. In eval mode without gradients, the rows are
    cached. They are computed again if the parameters change.
    """

    def __init__(self, width: int = 32, temperature: float = 0.1) -> None:
        super().__init__()
        self.weights = LengthWeights(width, temperature)
        self._cache: dict[tuple, Tensor] = {}

    def train(self, mode: bool = True) -> Self:
        """Sets the mode and empties the cache."""
        self._cache.clear()
        return super().train(mode)

    def _apply(self, *args, **kwargs) -> Self:
        self._cache.clear()
        return super()._apply(*args, **kwargs)

    def _cached_weights(self, lengths: list[int]) -> Tensor:
        """Returns the same as `LengthWeights.forward`. Computes and caches rows that are not cached yet."""
        versions = tuple(parameter._version for parameter in self.parameters())
        missing = [length for length in lengths if (length, versions) not in self._cache]
        if missing:
            for length, row in zip(missing, self.weights(missing), strict=True):
                self._cache[length, versions] = row[:length].clone()
        rows = [self._cache[length, versions] for length in lengths]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """Maps features of shape (B, K, D) to shape (B, D): pools the tokens whose `mask` entry is true."""
        counts = mask.sum(1)
        distinct, which = torch.unique(counts, return_inverse=True)
        lengths = distinct.flip(0).tolist()
        which = len(lengths) - 1 - which
        cached = not self.training and not torch.is_grad_enabled()
        table = self._cached_weights(lengths) if cached else self.weights(lengths)
        weights = nn.functional.pad(table, (0, mask.shape[1] - table.shape[1]))[which]
        return gpo_pool(features, weights, mask)
