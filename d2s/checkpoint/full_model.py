"""The model with all of its weights, whatever the engine has made of the one that it trains.

Under ZeRO 3 every forward of a module fetches weights from all workers, and every worker has to run the same modules
equally often. Evaluation does not: how often the pooling operator's weights are worked out, for one, depends on
the lengths that a worker meets. So it runs on a twin, which borrows all weights for as long as it lasts and fetches
nothing; and so does whoever writes the model to a disk, alone.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from d2s.model import D2SModel
from d2s.model.running_statistics import broadcast_running_statistics


class FullModel:
    """To be made before the engine, which puts its hooks into the model.

    model: the model inside of the module that the engine gets. stage: of ZeRO.
    """

    def __init__(self, model: D2SModel, stage: int) -> None:
        self._model, self._twin = model, None
        if stage == 3:
            # The same modules over the same buffers; parameters without memory, until they borrow some.
            memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
            for parameter in model.parameters():
                empty = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
                memo[id(parameter)] = nn.Parameter(empty, requires_grad=False)
            self._twin = copy.deepcopy(model, memo)

    @contextmanager
    def full(self) -> Iterator[D2SModel]:
        """The model, in eval mode and with full weights inside of this block, which all workers enter together.

        Under ZeRO 3 each of them holds all weights meanwhile, beside its share. Running statistics that workers
        compute apart (model.compat_batch_norm) become the first worker's, so all of them see one model.
        """
        broadcast_running_statistics(self._model)
        if self._twin is None:
            self._model.eval()
            yield self._model
            return
        from deepspeed.runtime.zero import GatheredParameters

        pairs = list(zip(self._model.parameters(), self._twin.parameters(), strict=True))
        with GatheredParameters([parameter for parameter, _ in pairs]), torch.no_grad():
            try:
                for parameter, borrowed in pairs:
                    borrowed.data = parameter.data
                yield self._twin.eval()  # which also makes the pooling operators forget earlier weights
            finally:
                for _, borrowed in pairs:
                    borrowed.data = torch.empty(0, dtype=borrowed.dtype, device=borrowed.device)
