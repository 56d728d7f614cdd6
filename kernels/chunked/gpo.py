"""GPO pooling: every channel sorted by itself along the tokens, then a weighted sum.

Two ways, one contract. float32 and below on a CPU: each sample apart at its own number of tokens, so that its
result does not depend on padding to the last bit, by numpy's vectorised value sort (several times faster than
torch.sort; numpy reads and writes the tensors' own memory, and lets go of the interpreter lock while sorting,
so the samples are shared out over as many threads as torch may use). Everything else: torch.sort.

How a value sort also gives the order: a float's bits, negative numbers mirrored, sort like the float. With
them in the high half of an int64 and the token's place in the low half, one sort of integers orders by value,
then by token, and carries the place along.
"""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from d2s.kernels.chunked.common import upcast


def gpo_forward(
    features: Tensor, weights: Tensor, mask: Tensor, need_features: bool, need_weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(pooled (B, D) in the type of the features, order (B, D * K) int32, value (B, D * K) acc).

    order, value: what the backward needs of the sort, empty where it needs nothing. Arguments as in
    `d2s.kernels.functional.gpo_pool`.
    """
    fast = _as_integers(features, features.dtype, *features.shape[1:])
    forward = _forward_as_integers if fast else _forward_by_torch
    return forward(features, weights, mask, need_features, need_weights)


def gpo_backward(
    grad: Tensor,
    weights: Tensor,
    mask: Tensor,
    order: Tensor,
    value: Tensor,
    dtype: torch.dtype,
    need_features: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor]:
    """(d_features (B, K, D) of dtype, d_weights (B, K) in the type of the weights); grad (B, D)."""
    shape = (*mask.shape, grad.shape[1])
    backward = _backward_as_integers if _as_integers(grad, dtype, *shape[1:]) else _backward_by_torch
    d_features, d_weights = backward(grad, weights, mask, order, value, shape, need_features, need_weights)
    return (
        d_features.to(dtype).contiguous() if need_features else grad.new_empty(0, dtype=dtype),
        d_weights.to(weights.dtype) if need_weights else weights.new_empty(0),
    )


def _as_integers(x: Tensor, dtype: torch.dtype, tokens: int, width: int) -> bool:
    """Whether features of dtype with samples (tokens, width), on the device of x, go the way by integers."""
    return x.device.type == "cpu" and dtype != torch.float64 and tokens * width < 2**31


def _forward_by_torch(
    features: Tensor, weights: Tensor, mask: Tensor, need_features: bool, need_weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x = upcast(features)
    real = torch.arange(mask.shape[1], device=mask.device) < mask.sum(1, keepdim=True)
    w = torch.where(real, weights.to(x.dtype), 0)
    x = x.masked_fill(~mask[:, :, None], -torch.inf).transpose(1, 2)
    value, order = torch.sort(x, dim=2, descending=True, stable=True)
    value = torch.where(real[:, None], value, 0)
    return (
        (value * w[:, None]).sum(2).to(features.dtype),
        order.to(torch.int32).flatten(1) if need_features else mask.new_empty(0, dtype=torch.int32),
        value.flatten(1) if need_weights else x.new_empty(0),
    )


def _backward_by_torch(
    grad: Tensor,
    weights: Tensor,
    mask: Tensor,
    order: Tensor,
    value: Tensor,
    shape: tuple[int, ...],
    need_features: bool,
    need_weights: bool,
) -> tuple[Tensor | None, Tensor | None]:
    batch, tokens, width = shape
    grad = upcast(grad)
    real = torch.arange(tokens, device=mask.device) < mask.sum(1, keepdim=True)
    d_features = d_weights = None
    if need_features:
        w = torch.where(real, weights.to(grad.dtype), 0)
        spread = grad[:, :, None] * w[:, None]
        place = order.view(batch, width, tokens).to(torch.int64)
        d_features = torch.empty_like(spread).scatter_(2, place, spread).transpose(1, 2)
    if need_weights:
        d_weights = (grad[:, :, None] * value.view(batch, width, tokens)).sum(1)
        d_weights = torch.where(real, d_weights, 0)
    return d_features, d_weights


def _forward_as_integers(
    features: Tensor, weights: Tensor, mask: Tensor, need_features: bool, need_weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x, w = upcast(features), weights.to(torch.float32).contiguous()
    batch, tokens, width = x.shape
    # A sample's own first width * length entries are used; row d of them is channel d in sorted order.
    order = _large((batch, tokens * width if need_features else 0), np.int32)
    value = _large((batch, tokens * width if need_weights else 0), np.float32)
    pooled = torch.zeros(batch, width)

    def sample(b: int, scratch: _Scratch) -> None:
        place = mask[b].nonzero().squeeze(1)
        length = place.shape[0]
        # What no backward reads is zero all the same: an operator's outputs are the same at every call.
        for kept in (order, value):
            kept.numpy()[b : b + 1, length * width :] = 0
        if length == 0:
            return
        real = x[b] if length == tokens else x[b].index_select(0, place)
        size, shape = width * length, (width, length)
        bits = scratch.keys[:size].view(shape)
        if need_weights:
            bits = value[b, :size].view(shape)
        keys = _keys(real, bits, scratch)
        if need_features:
            _sort_with_place(keys, place.numpy(), order[b, :size].numpy().reshape(shape), scratch)
        else:
            keys.sort(axis=1)
        ordered = _values(keys, scratch)
        np.einsum("dk,k->d", ordered, w[b, :length].numpy(), out=pooled[b].numpy())

    _each(sample, batch, tokens * width)
    return (
        pooled.to(features.dtype),
        order if need_features else order.new_empty(0),
        value if need_weights else value.new_empty(0),
    )


def _backward_as_integers(
    grad: Tensor,
    weights: Tensor,
    mask: Tensor,
    order: Tensor,
    value: Tensor,
    shape: tuple[int, ...],
    need_features: bool,
    need_weights: bool,
) -> tuple[Tensor | None, Tensor | None]:
    batch, tokens, width = shape
    grad, w = grad.to(torch.float32).contiguous(), weights.to(torch.float32).contiguous()
    lengths = mask.sum(1).tolist()
    full = min(lengths, default=0) == tokens
    d_features = d_weights = None
    if need_features:
        d_features = _large(shape, np.float32)
        if not full:
            d_features.zero_()
    if need_weights:
        d_weights = torch.zeros(batch, tokens)

    def sample(b: int, scratch: _Scratch) -> None:
        length = lengths[b]
        size, own, g = width * length, w[b, :length].numpy(), grad[b].numpy()
        if need_features:
            place, spread = scratch.wide[:size], scratch.keys[:size].numpy()
            place[:] = order[b, :size].numpy()
            np.multiply(g[:, None], own, out=spread.reshape(width, length))
            d_features[b].view(-1).numpy()[place] = spread
        if need_weights:
            ordered = value[b, :size].view(width, length).numpy()
            np.einsum("dk,d->k", ordered, g, out=d_weights[b, :length].numpy())

    _each(sample, batch, tokens * width)
    return d_features, d_weights


def _large(shape: tuple[int, ...], dtype: type) -> Tensor:
    """An empty tensor from numpy, which asks for huge pages: at 100 MB the page faults cost half a sort."""
    return torch.from_numpy(np.empty(shape, dtype))


class _Scratch:
    """What one thread works in, sample after sample: fresh memory for each would cost as much as the sort."""

    def __init__(self, entries: int) -> None:
        self.keys = torch.empty(entries)
        self.narrow = np.empty(entries, dtype=np.int32)
        self.wide = np.empty(entries, dtype=np.int64)


def _keys(real: Tensor, turned: Tensor, scratch: _Scratch) -> np.ndarray:
    """int32 (D, L) whose ascending order is the descending order of the float32 tokens real (L, D).

    They lie in the memory of turned, a float32 (D, L).
    """
    turned.copy_(real.t())
    # -0 equals 0, but only after this do their bits. In numpy, since torch would start its own threads.
    values = turned.numpy()
    values += 0.0
    bits = values.view(np.int32)
    _mirror(bits, scratch)
    return np.invert(bits, out=bits)


def _values(keys: np.ndarray, scratch: _Scratch) -> np.ndarray:
    """The float32 values (D, L) of keys (D, L), in the same memory."""
    np.invert(keys, out=keys)
    _mirror(keys, scratch)
    return keys.view(np.float32)


def _mirror(bits: np.ndarray, scratch: _Scratch) -> None:
    """Flips all bits but the sign of negative numbers, in place; twice is nothing."""
    sign = scratch.narrow[: bits.size].reshape(bits.shape)
    np.right_shift(bits, 31, out=sign)
    np.bitwise_and(sign, 0x7FFFFFFF, out=sign)
    np.bitwise_xor(bits, sign, out=bits)


def _sort_with_place(keys: np.ndarray, place: np.ndarray, order: np.ndarray, scratch: _Scratch) -> None:
    """Sorts keys (D, L) along L, and writes where each came from, as an entry of its sample (K, D), to order."""
    width, length = keys.shape
    both = scratch.wide[: keys.size].reshape(keys.shape)
    low, high = (0, 1) if sys.byteorder == "little" else (1, 0)
    halves = both.view(np.int32).reshape(width, length, 2)
    halves[..., high] = keys
    start = (place * width).astype(np.int32)
    np.add(start, np.arange(width, dtype=np.int32)[:, None], out=halves[..., low])
    both.sort(axis=1)
    order[...] = halves[..., low]
    keys[...] = halves[..., high]


def _each(sample: Callable[[int, _Scratch], None], batch: int, entries: int) -> None:
    """sample(b, scratch) for every b, over torch's number of threads where there is enough work for that."""
    lanes = min(torch.get_num_threads(), batch) if batch * entries >= 1 << 18 else 1

    def lane(first: int) -> None:
        scratch = _Scratch(entries)
        for b in range(first, batch, lanes):
            sample(b, scratch)

    if lanes <= 1:
        lane(0)
        return
    with ThreadPoolExecutor(lanes) as pool:
        for _ in pool.map(lane, range(lanes)):
            pass
