"""GPO pooling: every channel sorted by itself along the tokens, then a weighted sum.

Two ways, one contract. float32 and below on a CPU: by numpy (see `order`), each sample apart at its own number of
tokens, so that its result does not depend on padding to the last bit, and a block of channels at a time, so that what
the passes work in stays small. Of the sort it keeps the places, two bytes each, and gathers the values again in the
backward. numpy and torch work in the tensors' own memory and let go of the interpreter lock meanwhile, so the samples
are shared out over as many threads as torch may use. Everything else: torch.sort.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from d2s.kernels.chunked.common import HAS_NUMPY, upcast
from d2s.kernels.operators.define import place_type

if HAS_NUMPY:
    import numpy as np

    from d2s.kernels.chunked.order import Scratch, put, sort_values, sort_with_source, take

# Entries of a block of channels, large: each block costs the threads some hand-overs of the interpreter's lock, which
# weigh more with two threads than what a block that fits the cache saves.
BLOCK_ENTRIES = 1 << 19


def gpo_forward(
    features: Tensor, weights: Tensor, mask: Tensor, need_features: bool, need_weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(pooled (B, D) in the type of the features, order (B, D * K) of `place_type`, value (B, D * K) acc).

    order, value: what the backward needs of the sort, empty where it needs nothing, value also where
    `gpo_keeps_values` says no. Arguments as in `d2s.kernels.functional.gpo_pool`.
    """
    fast = _by_numpy(features, features.dtype, *features.shape[1:])
    forward = _forward_by_numpy if fast else _forward_by_torch
    return forward(features, weights, mask, need_features, need_weights)


def gpo_keeps_values(features: Tensor) -> bool:
    """Whether the backward reads the sorted values that the forward kept, rather than the features again."""
    return not _by_numpy(features, features.dtype, *features.shape[1:])


def gpo_backward(
    grad: Tensor,
    features: Tensor,
    weights: Tensor,
    mask: Tensor,
    order: Tensor,
    value: Tensor,
    need_features: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor]:
    """(d_features (B, K, D), d_weights (B, K)), in the types of grad and weights; grad (B, D).

    order, value: of `gpo_forward`. features: only read where value is not kept and the weights need a gradient.
    """
    shape = (*mask.shape, grad.shape[1])
    if _by_numpy(grad, grad.dtype, *shape[1:]):
        kept = features if need_weights else None
        d_features, d_weights = _backward_by_numpy(grad, kept, weights, mask, order, need_features)
    else:
        d_features, d_weights = _backward_by_torch(
            grad, weights, mask, order, value, shape, need_features, need_weights
        )
    return (
        d_features.to(grad.dtype).contiguous() if need_features else grad.new_empty(0),
        d_weights.to(weights.dtype) if need_weights else weights.new_empty(0),
    )


def _by_numpy(x: Tensor, dtype: torch.dtype, tokens: int, width: int) -> bool:
    """Whether features of dtype with samples (tokens, width), on the device of x, are sorted by numpy."""
    return HAS_NUMPY and x.device.type == "cpu" and dtype != torch.float64 and tokens * width < 2**31


def _forward_by_torch(
    features: Tensor, weights: Tensor, mask: Tensor, need_features: bool, need_weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    real = torch.arange(mask.shape[1], device=mask.device) < mask.sum(1, keepdim=True)
    # Padding goes behind the tokens first, or among values of -inf it would come before some of them.
    front = torch.sort(mask.to(torch.int8), dim=1, descending=True, stable=True)[1]
    x = upcast(features).gather(1, front[:, :, None].expand_as(features))
    w = torch.where(real, weights.to(x.dtype), 0)
    x = x.masked_fill(~real[:, :, None], -torch.inf).transpose(1, 2)
    value, order = torch.sort(x, dim=2, descending=True, stable=True)
    order = front[:, None].expand_as(order).gather(2, order)
    value = torch.where(real[:, None], value, 0)
    kind = place_type(mask.shape[1])
    return (
        (value * w[:, None]).sum(2).to(features.dtype),
        order.to(kind).flatten(1) if need_features else mask.new_empty(0, dtype=kind),
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


def _forward_by_numpy(
    features: Tensor, weights: Tensor, mask: Tensor, need_features: bool, need_weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x, w = upcast(features.detach()), weights.to(torch.float32).contiguous().numpy()
    batch, tokens, width = x.shape
    # By torch: numpy asks for huge pages, which to put together can take longer than the sort.
    # A sample's own first width * length entries are used; row d of them says for channel d which of the sample's
    # own tokens is the largest, the next, and so on.
    keep = need_features or need_weights
    order = torch.empty(batch, tokens * width if keep else 0, dtype=place_type(tokens)).numpy()
    pooled = np.zeros((batch, width), np.float32)
    real = mask.numpy()

    def sample(b: int, scratch: Scratch) -> None:
        place = real[b].nonzero()[0]
        length = place.shape[0]
        # What no backward reads is zero all the same: an operator's outputs are the same at every call.
        order[b, length * width :] = 0
        turned = _turn(x[b] if length == tokens else x[b, torch.from_numpy(place)], scratch)
        for first, last in _blocks(width, length):
            values = turned[first:last]
            if keep:
                ordered = scratch.ordered[: values.size].reshape(values.shape)
                source = sort_with_source(values, ordered, scratch)
                order[b, first * length : last * length] = source.reshape(-1)
            else:
                ordered = sort_values(values, scratch)
            np.einsum("dk,k->d", ordered, w[b, :length], out=pooled[b, first:last])

    _each(sample, batch, tokens, width)
    return (
        torch.from_numpy(pooled).to(features.dtype),
        torch.from_numpy(order if keep else order.reshape(-1)),
        torch.empty(0, dtype=torch.float32),
    )


def _backward_by_numpy(
    grad: Tensor, features: Tensor | None, weights: Tensor, mask: Tensor, order: Tensor, need_features: bool
) -> tuple[Tensor | None, Tensor]:
    """d_weights are zero without features."""
    (batch, tokens), width = mask.shape, grad.shape[1]
    g, w = (x.to(torch.float32).contiguous().numpy() for x in (grad, weights))
    x = None if features is None else upcast(features.detach())
    d_features = torch.empty((batch, tokens, width) if need_features else (0,), dtype=torch.float32)
    d_weights = np.zeros((batch, tokens), np.float32)
    order_of = order.numpy()

    def sample(b: int, scratch: Scratch) -> None:
        place = mask[b].nonzero()[:, 0]
        length = place.shape[0]
        whole = length == tokens
        turned = scratch.values[: width * length].reshape(width, length)
        if x is not None:
            _turn(x[b] if whole else x[b, place], scratch)
        for first, last in _blocks(width, length):
            ours, values = g[b, first:last], turned[first:last]
            source = order_of[b, first * length : last * length].reshape(values.shape)
            places = scratch.places(source)
            between = scratch.ordered[: values.size].reshape(values.shape)
            if x is not None:
                take(values, places, between)
                d_weights[b, :length] += np.einsum("dk,d->k", between, ours)
            if need_features:
                # The values of this block have been read: their gradient takes their place.
                np.multiply(ours[:, None], w[b, :length], out=between)
                put(between, places, values)
        if need_features and whole:
            d_features[b].copy_(torch.from_numpy(turned).t())
        elif need_features:
            d_features[b].zero_()
            d_features[b, place] = torch.from_numpy(turned).t()

    _each(sample, batch, tokens, width)
    return d_features, torch.from_numpy(d_weights)


def _blocks(width: int, length: int) -> list[tuple[int, int]]:
    """The channels (first, last) of each block of a sample of that many tokens."""
    if length == 0:
        return []
    size = max(1, BLOCK_ENTRIES // length)
    return [(first, min(first + size, width)) for first in range(0, width, size)]


def _turn(tokens: Tensor, scratch: Scratch) -> np.ndarray:
    """tokens (L, D) turned round, (D, L), in the memory of scratch.values."""
    turned = scratch.values[: tokens.numel()].reshape(tokens.shape[1], tokens.shape[0])
    # torch copies in blocks, three times as fast as numpy; -0 equals 0, but only after adding 0 do their bits.
    torch.from_numpy(turned).copy_(tokens.t())
    return np.add(turned, 0.0, out=turned)


def _each(sample: Callable[[int, Scratch], None], batch: int, tokens: int, width: int) -> None:
    """sample(b, scratch) for every b, over torch's number of threads where there is enough work for that."""
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
        for _ in pool.map(lane, range(lanes)):
            pass
