"""Protects the running statistics of BatchNorm, which each training forward changes without the optimizer.

Two problems are solved here. A forward changes the statistics before it is known whether the training step
will be skipped. And workers that compute their own statistics (model.compat_batch_norm) drift apart.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from d2s.workers.group import several_workers


def _statistics(module: nn.Module) -> list[Tensor]:
    norms = [child for child in module.modules() if isinstance(child, _BatchNorm)]
    return [buffer for norm in norms for buffer in norm.buffers(recurse=False)]


class RunningStatistics:
    """Undoes changes of running statistics, if a training step is skipped or a statistic becomes inf or NaN.

    A running average that is inf or NaN once would stay so for ever. No method waits for the device, and
    finite statistics keep every bit. Create the object after the module is moved to its device.
    """

    def __init__(self, module: nn.Module) -> None:
        self._buffers = _statistics(module)
        self._before: list[Tensor] = []

    def snapshot(self) -> None:
        """Stores the statistics. Call it before the forward of each training step."""
        self._before = [buffer.clone() for buffer in self._buffers]

    def restore(self) -> None:
        """Restores all statistics from the snapshot. Call it if the training step is skipped."""
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(before)

    def keep_finite(self) -> None:
        """Restores the entries that became inf or NaN, as a variance can although the loss is finite."""
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(torch.where(buffer.isfinite(), buffer, before))


def broadcast_running_statistics(module: nn.Module) -> None:
    """Gives every worker the running statistics of worker 0; all workers call it together.

    Call it before statistics are saved or used in eval mode. Training does not read them, so extra calls do
    not change those of worker 0, and a resumed run ends with the same bits as an uninterrupted run.
    """
    if several_workers():
        for buffer in _statistics(module):
            dist.broadcast(buffer, 0)
