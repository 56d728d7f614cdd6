"""Protects the running statistics of BatchNorm, which change in each training forward.

The forward runs before we know whether the training step will be skipped, so a skipped training step must
restore the statistics. With model.compat_batch_norm, each worker computes its own statistics, so these must
be made equal before they are used.
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
    """Undoes changes of running statistics if a training step is skipped or a statistic becomes inf or NaN.

    Without this, a running average that becomes inf or NaN would stay so. No method waits for the device.
    Create the object after the module is moved to its device.
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
        """Restores entries that became inf or NaN. A variance can overflow although the loss is finite."""
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(torch.where(buffer.isfinite(), buffer, before))


def broadcast_running_statistics(module: nn.Module) -> None:
    """Gives every worker the running statistics of worker 0. All workers must call this together.

    Call it before statistics are saved or used in eval mode. Training does not read running statistics, and
    worker 0 keeps its own. So the number of calls does not change the result of a run.
    """
    if several_workers():
        for buffer in _statistics(module):
            dist.broadcast(buffer, 0)
