"""Draws random numbers by a hash on the device. They depend on a sample's seed but not on its batch.

`expand` and `to_uniform` in `d2s.shards.order.draws` give the same numbers. There, seeds are called states.
"""

import torch
from torch import Tensor

from d2s.model.config import ModelConfig


def _as_int64(value: int) -> int:
    """Returns the signed integer with the same 64 bits as `value`, because torch.int64 is signed."""
    return value - 2**64 if value >= 2**63 else value


_GOLDEN = _as_int64(0x9E3779B97F4A7C15)
_FIRST_FACTOR = _as_int64(0xBF58476D1CE4E5B9)
_SECOND_FACTOR = _as_int64(0x94D049BB133111EB)
_DROPOUT_STREAM = _as_int64(0xD6E8FEB86659FD93)


def _shift_right(value: Tensor, by: int) -> Tensor:
    """Shifts int64 numbers to the right by `by` bits. Fills with 0, but torch's shift copies the sign."""
    return (value >> by) & ((1 << (64 - by)) - 1)


def splitmix64(value: Tensor) -> Tensor:
    """Applies the finaliser of splitmix64 to int64 tensors of any shape (Steele, Lea, Flood, OOPSLA 2014)."""
    value = (value ^ _shift_right(value, 30)) * _FIRST_FACTOR
    value = (value ^ _shift_right(value, 27)) * _SECOND_FACTOR
    return value ^ _shift_right(value, 31)


def _hashes(seeds: Tensor, count: int) -> Tensor:
    """Returns int64 hashes of shape (B, count). Row b depends only on seeds[b]."""
    counter = torch.arange(1, count + 1, device=seeds.device, dtype=torch.int64)
    return splitmix64(seeds[:, None] + counter * _GOLDEN)


def uniforms(seeds: Tensor, count: int) -> Tensor:
    """Draws uniform float64 numbers in [0, 1), of shape (B, count). Row b depends only on seeds[b]."""
    return _shift_right(_hashes(seeds, count), 11).double() * 2.0**-53


def dropout(values: Tensor, seeds: Tensor, rate: float) -> Tensor:
    """Applies dropout at `rate` to values of shape (B, ...). Row b depends only on seeds[b], an int64 number.

    Whether an entry is dropped depends on the seed and on the entry's position in its row. It does not depend
    on the row's length. One 64-bit hash serves four entries, so rates are rounded to multiples of 1 / 65536.
    """
    if rate <= 0:
        return values
    steps = round(rate * 65536)
    if steps >= 65536:
        return torch.zeros_like(values)
    flat = values.flatten(1)
    # With the seeds unchanged, the hashes would equal the hashes in `uniforms`.
    hashes = _hashes(seeds ^ _DROPOUT_STREAM, -(-flat.shape[1] // 4))
    keep = hashes.view(torch.int16)[:, : flat.shape[1]] >= steps - 32768
    return (flat * (keep.to(values.dtype) * (65536 / (65536 - steps)))).view_as(values)


def token_mask(seeds: Tensor, tokens: int, config: ModelConfig) -> Tensor:
    """Draws a boolean mask of shape (B, tokens) from B seeds. Size augmentation drops the false tokens.

    An image loses tokens with probability `token_dropout`. Each of its tokens is then dropped at a rate drawn
    between `token_dropout_min` and `token_dropout_max`. One token always stays. Source: Chen et al. (2021).
    """
    draws = uniforms(seeds, tokens + 2)
    per_image, rate, per_token = draws[:, :1], draws[:, 1:2], draws[:, 2:]
    rate = config.token_dropout_min + (config.token_dropout_max - config.token_dropout_min) * rate
    keep = (per_image >= config.token_dropout) | (per_token >= rate)
    return keep | (per_token == per_token.amax(1, keepdim=True))
