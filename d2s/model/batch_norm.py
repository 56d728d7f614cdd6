"""Batch normalisation whose training statistics cover all workers and exclude padding."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from d2s.workers.collectives import sum_over_workers
from d2s.workers.group import several_workers


class _SumOverWorkers(torch.autograd.Function):
    """Sums over workers. Each worker's loss depends on all addends, so gradients are summed too."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        return sum_over_workers(value)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        return sum_over_workers(grad)


def moments(values: Tensor, across_workers: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Returns count (1,), mean (C,), biased variance (C,) of values (n, C), of all workers if asked.

    Takes two passes, the second around the mean, because a single pass over squares loses digits in float32.
    """
    total = _SumOverWorkers.apply if across_workers and several_workers() else (lambda value: value)
    count = values.new_full((1,), float(values.shape[0]))
    sums = total(torch.cat([values.sum(0), count]))
    # The count is summed together with the values to save a collective. It gets no gradient.
    count = sums[-1:].detach().clamp(min=1.0)
    mean = sums[:-1] / count
    variance = total((values - mean).square().sum(0)) / count
    return count, mean, variance


class _WorkerBatchNorm:
    """Mixin for the classes below: computes training statistics over the (n, C) values of all workers."""

    across_workers = True

    def _normalise(self, values: Tensor) -> Tensor:
        """Normalises values (n, C) by their own statistics and updates the running statistics."""
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
    """BatchNorm over the real words of the global batch. The values (n, C) must not contain padding."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalises values (n, C): by batch statistics in training, by running statistics in eval mode."""
        return self._normalise(input) if self.training else super().forward(input)


class MapBatchNorm(_WorkerBatchNorm, nn.BatchNorm2d):
    """BatchNorm2d whose training statistics cover all workers. With one worker it is the same as torch's."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalises (B, C, H, W), by batch statistics in training, else by running statistics."""
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
