"""Where a number that is not finite came from: which workers, and with which samples.

The gathered exchange spreads one worker's NaN over all losses, and the reduction over all gradients, so the loss
and the norm only say that it happened. While :class:`Origin` watches, each worker looks at what is still its own:
its embeddings before they are gathered, and its gradients before they are reduced.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2s.workers.collectives import all_gather_objects

_KEYS = 8


class Origin:
    """Notes whether this worker made a number that is not finite.

    Watching reads every gradient once more, so it begins with the first skipped step and ends with the next good
    one; with `limit` 1, after which there is no second, it never ends.

    module: whose trainable parameters are watched. objective: the module that is called with this worker's
    embeddings as its first two arguments.
    """

    def __init__(self, module: nn.Module, objective: nn.Module, limit: int) -> None:
        self._module, self._objective, self._always = module, objective, limit == 1
        self._handles: list[Any] = []
        self._bad: list[Tensor] = []
        if self._always:
            self.watch()

    def watch(self) -> None:
        """Begins to watch, and forgets what was noted."""
        self._bad.clear()
        if self._handles:
            return
        self._handles.append(self._objective.register_forward_pre_hook(self._look_at_rows))
        for parameter in self._module.parameters():
            if parameter.requires_grad:
                self._handles.append(parameter.register_hook(self._look_at))

    def rest(self) -> None:
        """Ends watching, and forgets what was noted."""
        self._bad.clear()
        if self._always:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _look_at_rows(self, objective: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.look(*arguments[:2])

    def look(self, *rows: Tensor) -> None:
        """Looks at embeddings that do not pass through the objective's call, if it is watching."""
        if self._handles:
            for values in rows:
                self._look_at(values.detach())

    def _look_at(self, values: Tensor) -> None:
        # One number per tensor, and none is read before the step is over: the device is not waited for.
        self._bad.append(~torch.isfinite(values.sum()))

    def here(self) -> bool:
        """Whether a number of this worker's own was not finite since the last :meth:`watch`."""
        return bool(self._bad) and bool(torch.stack(self._bad).any().item())


def report(what: str, steps: int, evidence: int, keys: Sequence[str]) -> str:
    """The reason to stop, the same on every worker; all must call it together.

    what: "loss" or "gradient"; steps: skipped ones in a row; evidence: how much speaks for this worker as the one
    that it came from, the more the higher; keys: of this worker's samples.
    """
    mine = (evidence, list(keys[:_KEYS]), len(keys))
    found = all_gather_objects(mine)
    # Where nothing speaks for any of them it came up between them, in the sum of gradients: all are named.
    named = [rank for rank, other in enumerate(found) if other[0] == max(found)[0]]
    where = "; ".join(f"on worker {rank} with samples {_list(*found[rank][1:])}" for rank in named)
    return (
        f"the {what} was not finite in {steps} steps in a row, the last {where}: "
        "lower optim.lr or set engine.precision to fp32"
    )


def _list(keys: Sequence[str], count: int) -> str:
    more = f" and {count - len(keys)} more" if count > len(keys) else ""
    return (", ".join(keys) or "of a stream") + more
