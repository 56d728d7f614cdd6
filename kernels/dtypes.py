"""Chooses the number types in which the kernels compute sums and save token positions."""

import torch


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Returns the type in which inputs of type `dtype` are computed: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def position_dtype(tokens: int) -> torch.dtype:
    """Returns the integer type in which GPO pooling saves token positions, for samples of `tokens` tokens."""
    return torch.int16 if tokens <= 1 << 15 else torch.int32
