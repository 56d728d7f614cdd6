"""Implements batch normalisation. Its training statistics cover all workers and exclude padding."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from d2s.workers.collectives import sum_over_workers
from d2s.workers.group import several_workers


class _SumOverWorkers(torch.autograd.Function):
    """Sums a tensor over workers. The backward sums gradients, as every worker's loss uses the sum."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        return sum_over_workers(value)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        return sum_over_workers(grad)


def moments(values: Tensor, across_workers: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (count, mean, variance) of the rows of `values`, a tensor of shape (n, C) with C channels.

    The count is the number of rows, of shape (1,). The mean and the biased variance have shape (C,). If
    `across_workers` is true, all three cover the rows of all workers. A second pass sums the squares of
    values minus mean, because sums of raw squares lose digits in float32.
    """
    total = _SumOverWorkers.apply if across_workers and several_workers() else (lambda value: value)
    count = values.new_full((1,), float(values.shape[0]))
    sums = total(torch.cat([values.sum(0), count]))
    # One collective sums both the values and the count. The count gets no gradient.
    count = sums[-1:].detach().clamp(min=1.0)
    mean = sums[:-1] / count
    variance = total((values - mean).square().sum(0)) / count
    return count, mean, variance


class _WorkerBatchNorm:
    """Normalises by the statistics of all workers, in training. The two classes below inherit from it."""

    across_workers = True

    def _normalise(self, values: Tensor) -> Tensor:
        """Normalises `values`, of shape (n, C), by their mean and variance. Updates running statistics."""
        with torch.autocast(values.device.type, enabled=False):
            wide = values if values.dtype == torch.float64 else values.float()
            count, mean, variance = moments(wide, self.across_workers)
            self._update_running_statistics(count, mean.detach(), variance.detach())
            scaled = (wide - mean) * torch.rsqrt(variance + self.eps)
            return (scaled * self.weight.to(wide.dtype) + self.bias.to(wide.dtype)).to(values.dtype)

    @torch.no_grad()
    def _update_running_statistics(self, count: Tensor, mean: Tensor, variance: Tensor) -> None:
        unbiased = variance * (count / (count - 1).clamp(min=1.0))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        self.num_batches_tracked.add_(1)


class WordBatchNorm(_WorkerBatchNorm, nn.BatchNorm1d):
    """Applies BatchNorm to words. In training, the statistics cover the words of all workers."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalises n words of C channels. The `input` has shape (n, C) and must not contain padding."""
        return self._normalise(input) if self.training else super().forward(input)


class MapBatchNorm(_WorkerBatchNorm, nn.BatchNorm2d):
    """Applies BatchNorm2d with training statistics of all workers. With one worker it equals torch's."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalises feature maps. Input and result have shape (B, C, H, W)."""
        if not self.training or not several_workers():
            return super().forward(input)
        flat = input.movedim(1, 3)
        return self._normalise(flat.flatten(0, 2)).view(flat.shape).movedim(3, 1)


def share_statistics(module: nn.Module) -> nn.Module:
    """Turns every BatchNorm2d inside `module` into a `MapBatchNorm`, in place, and returns the module."""
    for child in module.modules():
        if type(child) is nn.BatchNorm2d:
            child.__class__ = MapBatchNorm
    return module
