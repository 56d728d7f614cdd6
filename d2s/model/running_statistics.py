"""Running statistics of BatchNorm: what a forward pass in training moves, though no optimizer looks after it.

A forward pass moves them before anybody knows whether its step will count, and where each worker computes its own
(model.compat_batch_norm) they drift apart. Both are mended here, from outside, for every kind of BatchNorm alike.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from d2s.workers.group import world_size


def _by_type(module: nn.Module) -> Iterator[list[Tensor]]:
    """The statistics inside `module`, those of one dtype at a time: a copy of many tensors is then one of one."""
    norms = [child for child in module.modules() if isinstance(child, _BatchNorm)]
    buffers = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
    for dtype in dict.fromkeys(buffer.dtype for buffer in buffers):
        yield [buffer for buffer in buffers if buffer.dtype == dtype]


def _joined(buffers: list[Tensor]) -> Tensor:
    return torch.cat([buffer.detach().view(-1) for buffer in buffers])


@torch.no_grad()
def _fill(buffers: list[Tensor], joined: Tensor) -> None:
    parts = joined.split([buffer.numel() for buffer in buffers])
    torch._foreach_copy_([buffer.view(-1) for buffer in buffers], list(parts))


class RunningStatistics:
    """Lets the statistics of a module follow the steps that count, and only with finite numbers.

    One that is inf or NaN would stay so: an average that follows adds to what it is. Nothing here waits for the
    device, and where all is finite not a bit changes. Make it once the module lies where it is trained.
    """

    def __init__(self, module: nn.Module) -> None:
        self._groups = list(_by_type(module))
        self._kept: list[Tensor] = []

    def keep(self) -> None:
        """To be called before the forward pass of a step."""
        self._kept = [_joined(buffers) for buffers in self._groups]

    def put_back(self) -> None:
        """The step is skipped: it leaves no trace."""
        for buffers, kept in zip(self._groups, self._kept, strict=True):
            _fill(buffers, kept)

    def settle(self) -> None:
        """The step is done: numbers that are not finite (a variance overflows before a loss does) are as before."""
        for buffers, kept in zip(self._groups, self._kept, strict=True):
            now = _joined(buffers)
            _fill(buffers, torch.where(now.isfinite(), now, kept))


def broadcast_running_statistics(module: nn.Module) -> None:
    """Gives all workers, which call it together, the first one's running statistics.

    To be called before anybody looks at them. Training never does, so those of the first worker are the same however
    often it is called, and a run that was interrupted ends as one that was not.
    """
    if world_size() == 1:
        return
    for buffers in _by_type(module):
        joined = _joined(buffers)
        dist.broadcast(joined, 0)
        _fill(buffers, joined)
