"""Finds the worker that first produced a number that is not finite, and its samples.

A NaN in the embeddings of one worker spreads to the losses of all workers, because embeddings are gathered. A NaN in
a gradient spreads when gradients are reduced. So loss and gradient norm do not show which worker produced the NaN. An
active :class:`NonFiniteDetector` inspects a worker's embeddings and gradients before the workers exchange them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2s.workers.collectives import all_gather_objects

MOST_KEYS = 8
"""How many keys of samples an error message lists for each worker, at most."""


class NonFiniteDetector:
    """Records whether this worker produced a number that is not finite.

    Inspection takes time, because it reads every gradient once more. So the detector is active only from a skipped
    training step to the next step that is not skipped. If `limit` is 1, it is always active.

    module: the gradients of its trainable parameters are inspected. objective: a module. The first two arguments of
    its calls, this worker's embeddings, are inspected. limit: how many skipped steps in a row end the run.
    """

    def __init__(self, module: nn.Module, objective: nn.Module, limit: int) -> None:
        self._module, self._objective, self._always = module, objective, limit == 1
        self._handles: list[Any] = []
        self._nonfinite: list[Tensor] = []
        if self._always:
            self.start()

    def start(self) -> None:
        """Discards earlier findings and starts to inspect."""
        self._nonfinite.clear()
        if self._handles:
            return
        self._handles.append(self._objective.register_forward_pre_hook(self._inspect_arguments))
        for parameter in self._module.parameters():
            if parameter.requires_grad:
                self._handles.append(parameter.register_hook(self._record))

    def stop(self) -> None:
        """Discards earlier findings and, unless the detector is always active, stops inspecting."""
        self._nonfinite.clear()
        if self._always:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def inspect(self, *embeddings: Tensor) -> None:
        """Inspects embeddings, if the detector is active. Needed only if `objective` is not called with them."""
        if self._handles:
            for values in embeddings:
                self._record(values.detach())

    def _inspect_arguments(self, objective: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.inspect(*arguments[:2])

    def _record(self, values: Tensor) -> None:
        # Keep one number for each tensor, and read it after the training step. Reading now would wait for the device.
        self._nonfinite.append(~torch.isfinite(values.sum()))

    def found_any(self) -> bool:
        """Returns whether this worker produced a number that is not finite since the last :meth:`start`."""
        return bool(self._nonfinite) and bool(torch.stack(self._nonfinite).any().item())


def report(what: str, steps: int, evidence: int, keys: Sequence[str]) -> str:
    """Returns the error message, which is the same on every worker. All workers call this together.
    what: "loss" or "gradient". steps: how many training steps in a row were skipped. evidence: a number that is
    higher if this worker is more likely the origin. The message names the workers with the highest number, and the
    `keys` of their samples."""
    mine = (evidence, list(keys[:MOST_KEYS]), len(keys))
    found = all_gather_objects(mine)
    # If the NaN arose in the sum of the workers' gradients, `evidence` is 0 on all workers: name all of them.
    named = [rank for rank, other in enumerate(found) if other[0] == max(found)[0]]
    where = "; ".join(f"on worker {rank} with samples {_list(*found[rank][1:])}" for rank in named)
    return (
        f"the {what} was not finite in {steps} steps in a row, the last {where}: "
        "lower optim.lr or set engine.precision to fp32"
    )


def _list(keys: Sequence[str], count: int) -> str:
    more = f" and {count - len(keys)} more" if count > len(keys) else ""
    return (", ".join(keys) or "of a stream") + more
