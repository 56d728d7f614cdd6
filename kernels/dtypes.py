"""The types in which the implementations compute and save."""

import torch


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Returns the type to compute in: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def position_dtype(tokens: int) -> torch.dtype:
    """Returns the integer type in which GPO saves a token's position, for samples of `tokens` tokens."""
    return torch.int16 if tokens <= 1 << 15 else torch.int32
