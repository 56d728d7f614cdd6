"""Implements GPO pooling: sorts each channel on its own along the tokens, then takes a weighted sum.

pooled[b, d] = sum over k of weights[b, k] * ordered[b, k, d]. So d_weights[b, k] = sum over d of
grad[b, d] * ordered[b, k, d]. The token of rank k gets the gradient grad[b, d] * weights[b, k].

On a CPU, for float32 and smaller types, numpy sorts (see `order`). In all other cases torch sorts. numpy
sorts each sample without padding, so padding does not change a bit of the result. It sorts a block of
channels at a time, which saves memory. The forward then saves only the order, with two bytes per entry. numpy
and torch release the interpreter lock, so the samples are spread over as many threads as torch may use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from d2s.kernels.chunked.common import HAS_NUMPY, upcast
from d2s.kernels.dtypes import position_dtype

if HAS_NUMPY:
    import numpy as np

    from d2s.kernels.chunked.order import Scratch, put, sort_values, sort_with_source, take

# Entries in a block of channels. Threads wait for the interpreter lock once per block. With two threads, this
# costs more than the cache saves with small blocks. So blocks are large.
BLOCK_ENTRIES = 1 << 19


def gpo_forward(
    features: Tensor, weights: Tensor, mask: Tensor, need: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (pooled, order, value). See `d2s.kernels.functional.gpo_pool`.

    `pooled` has shape (B, D) and the type of the features. `order` and `value` have shape (B, D * K) and are
    for the backward. They hold each channel's token positions (of `position_dtype`) and values (of the
    accumulator type) in sorted order. Each is empty if the backward does not read it. `need` holds two bools:
    whether the features and the weights need a gradient.
    """
    forward = _forward_by_numpy if _by_numpy(features, *features.shape[1:]) else _forward_by_torch
    return forward(features, weights, mask, need)


def gpo_saves_values(features: Tensor) -> bool:
    """Returns whether `gpo_forward` saves the sorted values. If not, `gpo_backward` reads `features`."""
    return not _by_numpy(features, *features.shape[1:])


def gpo_backward(
    grad: Tensor,
    features: Tensor,
    weights: Tensor,
    mask: Tensor,
    order: Tensor,
    value: Tensor,
    need: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Returns d_features, of shape (B, K, D), and d_weights, of shape (B, K).

    They have the types of `grad` and of `weights`. `need` says which of the two are computed. `order` and
    `value` come from `gpo_forward`. If `value` is empty, `features` is read to compute d_weights.
    """
    if _by_numpy(grad, mask.shape[1], grad.shape[1]):
        d_features, d_weights = _backward_by_numpy(
            grad, features if need[1] else None, weights, mask, order, need[0]
        )
    else:
        d_features, d_weights = _backward_by_torch(grad, weights, mask, order, value, need)
    return (
        d_features.to(grad.dtype).contiguous() if need[0] else grad.new_empty(0),
        d_weights.to(weights.dtype) if need[1] else weights.new_empty(0),
    )


def _by_numpy(x: Tensor, tokens: int, width: int) -> bool:
    """Returns whether numpy sorts samples of `tokens` x `width` entries with the type and device of x."""
    return HAS_NUMPY and x.device.type == "cpu" and x.dtype != torch.float64 and tokens * width < 2**31


def _forward_by_torch(
    features: Tensor, weights: Tensor, mask: Tensor, need: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `gpo_forward` with torch's sort."""
    real = torch.arange(mask.shape[1], device=mask.device) < mask.sum(1, keepdim=True)
    # First move padding behind the real tokens. Otherwise the sort could put it before real tokens of -inf.
    front = torch.sort(mask.to(torch.int8), dim=1, descending=True, stable=True)[1]
    x = upcast(features).gather(1, front[:, :, None].expand_as(features))
    w = torch.where(real, weights.to(x.dtype), 0)
    x = x.masked_fill(~real[:, :, None], -torch.inf).transpose(1, 2)
    value, order = torch.sort(x, dim=2, descending=True, stable=True)
    order = front[:, None].expand_as(order).gather(2, order)
    value = torch.where(real[:, None], value, 0)
    kind = position_dtype(mask.shape[1])
    return (
        (value * w[:, None]).sum(2).to(features.dtype),
        order.to(kind).flatten(1) if need[0] else mask.new_empty(0, dtype=kind),
        value.flatten(1) if need[1] else x.new_empty(0),
    )


def _backward_by_torch(
    grad: Tensor, weights: Tensor, mask: Tensor, order: Tensor, value: Tensor, need: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Computes `gpo_backward` from the `order` and `value` of `_forward_by_torch`."""
    (batch, tokens), width = mask.shape, grad.shape[1]
    grad = upcast(grad)
    real = torch.arange(tokens, device=mask.device) < mask.sum(1, keepdim=True)
    d_features = d_weights = None
    if need[0]:
        w = torch.where(real, weights.to(grad.dtype), 0)
        spread = grad[:, :, None] * w[:, None]
        place = order.view(batch, width, tokens).to(torch.int64)
        d_features = torch.empty_like(spread).scatter_(2, place, spread).transpose(1, 2)
    if need[1]:
        d_weights = (grad[:, :, None] * value.view(batch, width, tokens)).sum(1)
        d_weights = torch.where(real, d_weights, 0)
    return d_features, d_weights


def _forward_by_numpy(
    features: Tensor, weights: Tensor, mask: Tensor, need: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `gpo_forward` with numpy's sort, one sample at a time."""
    x, w = upcast(features.detach()), weights.to(torch.float32).contiguous().numpy()
    batch, tokens, width = x.shape
    # A sample with L real tokens uses the first D * L entries of its row of `order`. They hold the positions
    # of the tokens for each channel, the largest value first. torch allocates `order`, because numpy asks for
    # huge pages, which can take longer than the sort.
    save = any(need)
    order = torch.empty(batch, tokens * width if save else 0, dtype=position_dtype(tokens)).numpy()
    pooled = np.zeros((batch, width), np.float32)
    real = mask.numpy()

    def sample(b: int, scratch: Scratch) -> None:
        place = real[b].nonzero()[0]
        length = place.shape[0]
        # The backward does not read these entries. But an operator must return the same values at every call.
        order[b, length * width :] = 0
        turned = _turn(x[b] if length == tokens else x[b, torch.from_numpy(place)], scratch)
        for first, last in _blocks(width, length):
            values = turned[first:last]
            if save:
                ordered = scratch.ordered[: values.size].reshape(values.shape)
                source = sort_with_source(values, ordered, scratch)
                order[b, first * length : last * length] = source.reshape(-1)
            else:
                ordered = sort_values(values, scratch)
            np.einsum("dk,k->d", ordered, w[b, :length], out=pooled[b, first:last])

    _each(sample, batch, tokens, width)
    return (
        torch.from_numpy(pooled).to(features.dtype),
        torch.from_numpy(order if save else order.reshape(-1)),
        torch.empty(0, dtype=torch.float32),
    )


def _backward_by_numpy(
    grad: Tensor, features: Tensor | None, weights: Tensor, mask: Tensor, order: Tensor, need_features: bool
) -> tuple[Tensor | None, Tensor]:
    """Computes `gpo_backward` in float32. Returns zeros as d_weights if `features` is None."""
    (batch, tokens), width = mask.shape, grad.shape[1]
    g, w = (x.to(torch.float32).contiguous().numpy() for x in (grad, weights))
    x = None if features is None else upcast(features.detach())
    d_features = torch.empty((batch, tokens, width) if need_features else (0,), dtype=torch.float32)
    d_weights = np.zeros((batch, tokens), np.float32)
    order_of = order.numpy()

    def sample(b: int, scratch: Scratch) -> None:
        place = mask[b].nonzero()[:, 0]
        length = place.shape[0]
        all_real = length == tokens
        turned = scratch.values[: width * length].reshape(width, length)
        if x is not None:
            _turn(x[b] if all_real else x[b, place], scratch)
        for first, last in _blocks(width, length):
            ours, values = g[b, first:last], turned[first:last]
            source = order_of[b, first * length : last * length].reshape(values.shape)
            places = scratch.places(source)
            between = scratch.ordered[: values.size].reshape(values.shape)
            if x is not None:
                take(values, places, between)
                d_weights[b, :length] += np.einsum("dk,d->k", between, ours)
            if need_features:
                # The values of this block are not needed any more. Their gradient overwrites them.
                np.multiply(ours[:, None], w[b, :length], out=between)
                put(between, places, values)
        if need_features and all_real:
            d_features[b].copy_(torch.from_numpy(turned).t())
        elif need_features:
            d_features[b].zero_()
            d_features[b, place] = torch.from_numpy(turned).t()

    _each(sample, batch, tokens, width)
    return d_features, torch.from_numpy(d_weights)


def _blocks(width: int, length: int) -> list[tuple[int, int]]:
    """Returns (first, end) of each block of channels. `end` is excluded. Samples have `length` tokens."""
    if length == 0:
        return []
    size = max(1, BLOCK_ENTRIES // length)
    return [(first, min(first + size, width)) for first in range(0, width, size)]


def _turn(tokens: Tensor, scratch: Scratch) -> np.ndarray:
    """Writes the transpose of `tokens`, which has shape (L, D), to `scratch.values` and returns it."""
    turned = scratch.values[: tokens.numel()].reshape(tokens.shape[1], tokens.shape[0])
    # torch transposes three times as fast as numpy. Adding 0 turns -0 into 0, because the sort
    # compares bits.
    torch.from_numpy(turned).copy_(tokens.t())
    return np.add(turned, 0.0, out=turned)


def _each(sample: Callable[[int, Scratch], None], batch: int, tokens: int, width: int) -> None:
    """Calls sample(b, scratch) for every b < `batch`. Large batches use as many threads as torch may use."""
    entries = tokens * width
    lanes = min(torch.get_num_threads(), batch) if batch * entries >= 1 << 18 else 1

    def lane(first: int) -> None:
        scratch = Scratch(entries, min(entries, max(BLOCK_ENTRIES, tokens)))
        for b in range(first, batch, lanes):
            sample(b, scratch)

    if lanes <= 1:
        lane(0)
        return
    with ThreadPoolExecutor(lanes) as pool:
        list(pool.map(lane, range(lanes)))
