"""Running statistics of BatchNorm, which every training forward changes although no optimizer manages them.

Two problems are solved here for every kind of BatchNorm: a forward changes them before anybody knows whether its
step will be skipped, and workers that compute their own (model.compat_batch_norm) drift apart.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from d2s.workers.group import world_size


def _buffers_by_dtype(module: nn.Module) -> Iterator[list[Tensor]]:
    """The statistics inside `module`, one list for each dtype, so that a list is copied as one tensor."""
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
    """Undoes what a skipped step changed in a module's statistics, and keeps numbers that are not finite out.

    A running average that is inf or NaN once stays so. Nothing here waits for the device, and finite statistics keep
    every bit. Create it when the module is on the device on which it is trained.
    """

    def __init__(self, module: nn.Module) -> None:
        self._groups = list(_buffers_by_dtype(module))
        self._before: list[Tensor] = []

    def snapshot(self) -> None:
        """Remember the statistics; call it before the forward of a step."""
        self._before = [_flatten(buffers) for buffers in self._groups]

    def restore(self) -> None:
        """Restore all statistics: the step is skipped."""
        for buffers, before in zip(self._groups, self._before, strict=True):
            _copy_into(buffers, before)

    def keep_finite(self) -> None:
        """Restore the entries that are not finite after a step: a variance overflows before a loss does."""
        for buffers, before in zip(self._groups, self._before, strict=True):
            now = _flatten(buffers)
            _copy_into(buffers, torch.where(now.isfinite(), now, before))


def broadcast_running_statistics(module: nn.Module) -> None:
    """Give every worker the running statistics of worker 0; all workers call it together.

    Call it before statistics are saved or used in eval mode. Training does not read them, so how often it is called
    changes nothing in those of worker 0, and a resumed run ends with the bits of an uninterrupted one.
    """
    if world_size() == 1:
        return
    for buffers in _buffers_by_dtype(module):
        flat = _flatten(buffers)
        dist.broadcast(flat, 0)
        _copy_into(buffers, flat)
