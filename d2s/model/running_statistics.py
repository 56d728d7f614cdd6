"""Protects the running statistics of BatchNorm, which each training forward changes without the optimizer.

Two problems are solved here. A forward changes the statistics before it is known whether the training step
will be skipped. And workers that compute their own statistics (model.compat_batch_norm) drift apart.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from d2s.workers.group import world_size


def _buffers_by_dtype(module: nn.Module) -> Iterator[list[Tensor]]:
    """Yields the statistics inside `module`: one list for each dtype, to be copied as one tensor."""
    norms = [child for child in module.modules() if isinstance(child, _BatchNorm)]
    buffers = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
    for dtype in dict.fromkeys(buffer.dtype for buffer in buffers):
        yield [buffer for buffer in buffers if buffer.dtype == dtype]


def _flatten(buffers: list[Tensor]) -> Tensor:
    return torch.cat([buffer.detach().view(-1) for buffer in buffers])


@torch.no_grad()
def _copy_into(buffers: list[Tensor], flat: Tensor) -> None:
    parts = flat.split([buffer.numel() for buffer in buffers])
    torch._foreach_copy_([buffer.view(-1) for buffer in buffers], list(parts))


class RunningStatistics:
    """Undoes changes of running statistics, if a training step is skipped or a statistic becomes inf or NaN.

    A running average that is inf or NaN once would stay so for ever. No method waits for the device, and
    finite statistics keep every bit. Create the object after the module is moved to its device.
    """

    def __init__(self, module: nn.Module) -> None:
        self._groups = list(_buffers_by_dtype(module))
        self._before: list[Tensor] = []

    def snapshot(self) -> None:
        """Stores the statistics. Call it before the forward of each training step."""
        self._before = [_flatten(buffers) for buffers in self._groups]

    def restore(self) -> None:
        """Restores all statistics from the snapshot. Call it if the training step is skipped."""
        for buffers, before in zip(self._groups, self._before, strict=True):
            _copy_into(buffers, before)

    def keep_finite(self) -> None:
        """Restores the entries that became inf or NaN, as a variance can although the loss is finite."""
        for buffers, before in zip(self._groups, self._before, strict=True):
            now = _flatten(buffers)
            _copy_into(buffers, torch.where(now.isfinite(), now, before))


def broadcast_running_statistics(module: nn.Module) -> None:
    """Gives every worker the running statistics of worker 0; all workers call it together.

    Call it before statistics are saved or used in eval mode. Training does not read them, so extra calls do
    not change those of worker 0, and a resumed run ends with the same bits as an uninterrupted run.
    """
    if world_size() == 1:
        return
    for buffers in _buffers_by_dtype(module):
        flat = _flatten(buffers)
        dist.broadcast(flat, 0)
        _copy_into(buffers, flat)
