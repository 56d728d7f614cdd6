"""Random numbers that belong to a sample and not to its batch: a counter-based hash on the device.

The twin of `expand` and `to_uniform` in `d2s.shards.order.draws`, bit for bit: a sample's seed is its state there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2s.model.config import ModelConfig


def _wrapped(value: int) -> int:
    """A 64-bit number as the signed integer with the same bits, which is what torch can hold."""
    return value - 2**64 if value >= 2**63 else value


_GOLDEN = _wrapped(0x9E3779B97F4A7C15)
_FIRST = _wrapped(0xBF58476D1CE4E5B9)
_SECOND = _wrapped(0x94D049BB133111EB)
_DROPOUT = _wrapped(0xD6E8FEB86659FD93)


def _right(value: Tensor, by: int) -> Tensor:
    """Logical shift to the right: torch's own carries the sign along."""
    return (value >> by) & ((1 << (64 - by)) - 1)


def mix(value: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64 tensors, bit for bit (Steele, Lea, Flood, OOPSLA 2014)."""
    value = (value ^ _right(value, 30)) * _FIRST
    value = (value ^ _right(value, 27)) * _SECOND
    return value ^ _right(value, 31)


def uniforms(seeds: Tensor, count: int) -> Tensor:
    """Numbers in [0, 1): (B, count) float64, row b a function of seeds[b] (int64) alone."""
    counter = torch.arange(1, count + 1, device=seeds.device, dtype=torch.int64)
    bits = mix(seeds[:, None] + counter * _GOLDEN)
    return _right(bits, 11).double() * 2.0**-53


def dropout(values: Tensor, seeds: Tensor, rate: float) -> Tensor:
    """Dropout whose draws belong to the sample: values (B, ...), of which row b draws from seeds[b] (int64) alone.

    An entry's draw depends on its place within the row, counted from the front, and not on the row's length. The
    rate is kept to 1 / 65536: one hash serves four entries.
    """
    if rate <= 0:
        return values
    steps = round(rate * 65536)
    if steps >= 65536:
        return torch.zeros_like(values)
    flat = values.flatten(1)
    counter = torch.arange(1, -(-flat.shape[1] // 4) + 1, device=seeds.device, dtype=torch.int64)
    # A stream of its own: `uniforms` draws from the seeds themselves.
    bits = mix((seeds ^ _DROPOUT)[:, None] + counter * _GOLDEN)
    kept = bits.view(torch.int16)[:, : flat.shape[1]] >= steps - 32768
    return (flat * (kept.to(values.dtype) * (65536 / (65536 - steps)))).view_as(values)


def kept_tokens(seeds: Tensor, tokens: int, config: ModelConfig) -> Tensor:
    """Size augmentation: which tokens of each image stay, (B, tokens) bool.

    A share `token_dropout` of the images loses each token with a rate drawn between `token_dropout_min` and
    `token_dropout_max`; the others lose none. One token always stays.
    """
    draws = uniforms(seeds, tokens + 2)
    touched, rate, each = draws[:, :1], draws[:, 1:2], draws[:, 2:]
    rate = config.token_dropout_min + (config.token_dropout_max - config.token_dropout_min) * rate
    kept = (touched >= config.token_dropout) | (each >= rate)
    return kept | (each == each.amax(1, keepdim=True))
