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
from torch.autograd.function import once_differentiable

from d2s.kernels.chunked.common import upcast


def gpo_pool(features: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """See `d2s.kernels.functional.gpo_pool`."""
    plain = features.device.type == "cpu" and features.dtype != torch.float64
    if not plain or features.shape[1] * features.shape[2] >= 2**31:
        return _SortedByTorch.apply(features, weights, mask)
    grad = torch.is_grad_enabled()
    return _SortedAsIntegers.apply(
        features, weights, mask, grad and features.requires_grad, grad and weights.requires_grad
    )


class _SortedByTorch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, weights, mask):
        x = upcast(features)
        real = torch.arange(mask.shape[1], device=mask.device) < mask.sum(1, keepdim=True)
        w = torch.where(real, weights.detach().to(x.dtype), 0)
        x = x.masked_fill(~mask[:, :, None], -torch.inf).transpose(1, 2)
        value, order = torch.sort(x, dim=2, descending=True, stable=True)
        value = torch.where(real[:, None], value, 0)
        ctx.save_for_backward(value, order, w, real)
        ctx.types = (features.dtype, weights.dtype)
        return (value * w[:, None]).sum(2).to(features.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        value, order, w, real = ctx.saved_tensors
        grad = grad.to(value.dtype)
        d_features = d_weights = None
        if ctx.needs_input_grad[0]:
            spread = grad[:, :, None] * w[:, None]
            d_features = torch.empty_like(value).scatter_(2, order, spread)
            d_features = d_features.transpose(1, 2).to(ctx.types[0])
        if ctx.needs_input_grad[1]:
            d_weights = (grad[:, :, None] * value).sum(1)
            d_weights = torch.where(real, d_weights, 0).to(ctx.types[1])
        return d_features, d_weights, None


class _SortedAsIntegers(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, weights, mask, keep_order, keep_value):
        x, w = upcast(features), weights.detach().to(torch.float32).contiguous()
        batch, tokens, width = x.shape
        # A sample's own first width * length entries are used; row d of them is channel d in sorted order.
        order = _large((batch, tokens * width), np.int32) if keep_order else None
        value = _large((batch, tokens * width), np.float32) if keep_value else None
        pooled = torch.zeros(batch, width)

        def sample(b: int, scratch: _Scratch) -> None:
            place = mask[b].nonzero().squeeze(1)
            length = place.shape[0]
            if length == 0:
                return
            real = x[b] if length == tokens else x[b].index_select(0, place)
            size, shape = width * length, (width, length)
            bits = scratch.keys[:size].view(shape)
            if keep_value:
                bits = value[b, :size].view(shape)
            keys = _keys(real, bits, scratch)
            if keep_order:
                _sort_with_place(keys, place.numpy(), order[b, :size].numpy().reshape(shape), scratch)
            else:
                keys.sort(axis=1)
            ordered = _values(keys, scratch)
            np.einsum("dk,k->d", ordered, w[b, :length].numpy(), out=pooled[b].numpy())

        _each(sample, batch, tokens * width)
        ctx.save_for_backward(order, value, w, mask)
        ctx.shape, ctx.types = tuple(x.shape), (features.dtype, weights.dtype)
        return pooled.to(features.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        order, value, w, mask = ctx.saved_tensors
        batch, tokens, width = ctx.shape
        grad = grad.to(torch.float32).contiguous()
        lengths = mask.sum(1).tolist()
        full = min(lengths, default=0) == tokens
        d_features = d_weights = None
        if order is not None:
            d_features = _large(ctx.shape, np.float32)
            if not full:
                d_features.zero_()
        if value is not None:
            d_weights = torch.zeros(batch, tokens)

        def sample(b: int, scratch: _Scratch) -> None:
            length = lengths[b]
            size, own, g = width * length, w[b, :length].numpy(), grad[b].numpy()
            if order is not None:
                place, spread = scratch.wide[:size], scratch.keys[:size].numpy()
                place[:] = order[b, :size].numpy()
                np.multiply(g[:, None], own, out=spread.reshape(width, length))
                d_features[b].view(-1).numpy()[place] = spread
            if value is not None:
                ordered = value[b, :size].view(width, length).numpy()
                np.einsum("dk,d->k", ordered, g, out=d_weights[b, :length].numpy())

        _each(sample, batch, tokens * width)
        return (
            None if d_features is None else d_features.to(ctx.types[0]),
            None if d_weights is None else d_weights.to(ctx.types[1]),
            None,
            None,
            None,
        )


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
