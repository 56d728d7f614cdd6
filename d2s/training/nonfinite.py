"""Finds which worker, with which samples, produced a number that is not finite.

Gathered embeddings spread one worker's NaN over all losses, and the reduction spreads it over all gradients. So the
loss and the gradient's norm show that it happened, but not where. While :class:`NonFiniteDetector` is active, each
worker inspects its own numbers: its embeddings before they are gathered, its gradients before they are reduced.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2s.workers.collectives import all_gather_objects

MOST_KEYS = 8
"""Sample keys of a worker that an error message lists."""


class NonFiniteDetector:
    """Records whether this worker produced a number that is not finite.

    It reads every gradient once more, so it is active only from a skipped step to the next good one; with `limit` 1,
    where the first skipped step ends the run, it is always active.

    module: its trainable parameters are inspected. objective: the module that is called with this worker's
    embeddings as its first two arguments. limit: consecutive skipped steps that end the run.
    """

    def __init__(self, module: nn.Module, objective: nn.Module, limit: int) -> None:
        self._module, self._objective, self._always = module, objective, limit == 1
        self._handles: list[Any] = []
        self._nonfinite: list[Tensor] = []
        if self._always:
            self.start()

    def start(self) -> None:
        """Forgets what was recorded and starts to inspect."""
        self._nonfinite.clear()
        if self._handles:
            return
        self._handles.append(self._objective.register_forward_pre_hook(self._inspect_arguments))
        for parameter in self._module.parameters():
            if parameter.requires_grad:
                self._handles.append(parameter.register_hook(self._record))

    def stop(self) -> None:
        """Forgets what was recorded and stops to inspect, unless the detector is always active."""
        self._nonfinite.clear()
        if self._always:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def inspect(self, *embeddings: Tensor) -> None:
        """Inspects embeddings that did not pass through the objective's call, if the detector is active."""
        if self._handles:
            for values in embeddings:
                self._record(values.detach())

    def _inspect_arguments(self, objective: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.inspect(*arguments[:2])

    def _record(self, values: Tensor) -> None:
        # One number per tensor, read only after the step, so that nothing waits for the device here.
        self._nonfinite.append(~torch.isfinite(values.sum()))

    def found_any(self) -> bool:
        """Whether this worker produced a number that is not finite since the last :meth:`start`."""
        return bool(self._nonfinite) and bool(torch.stack(self._nonfinite).any().item())


def report(what: str, steps: int, evidence: int, keys: Sequence[str]) -> str:
    """The reason to stop, the same on every worker; all must call it together.

    what: "loss" or "gradient". steps: number of consecutive skipped steps. evidence: how sure it is that this worker
    is the origin; the workers with the highest number are named. keys: keys of this worker's samples.
    """
    mine = (evidence, list(keys[:MOST_KEYS]), len(keys))
    found = all_gather_objects(mine)
    # Without evidence on any worker it arose in the sum of their gradients: all are named.
    named = [rank for rank, other in enumerate(found) if other[0] == max(found)[0]]
    where = "; ".join(f"on worker {rank} with samples {_list(*found[rank][1:])}" for rank in named)
    return (
        f"the {what} was not finite in {steps} steps in a row, the last {where}: "
        "lower optim.lr or set engine.precision to fp32"
    )


def _list(keys: Sequence[str], count: int) -> str:
    more = f" and {count - len(keys)} more" if count > len(keys) else ""
    return (", ".join(keys) or "of a stream") + more
