"""The model with all of its weights, for evaluation and export under any ZeRO stage.

Under ZeRO 3 every forward of a module gathers weights from all workers, and every worker has to run the same modules
equally often. Evaluation does not: how often the pooling operator computes its weights, for example, depends on the
lengths that a worker meets. It therefore runs on a copy of the model that borrows all weights and gathers nothing.
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
    """Gives access to all weights of a model in training. Create it before the engine, which adds hooks to the model.

    model: the model inside the module that the engine gets. stage: of ZeRO, 0 to 3.
    """

    def __init__(self, model: D2SModel, stage: int) -> None:
        self._model, self._copy = model, None
        if stage == 3:
            # The copy shares the buffers; its parameters are empty until they borrow the model's.
            memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
            for parameter in model.parameters():
                empty = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
                memo[id(parameter)] = nn.Parameter(empty, requires_grad=False)
            self._copy = copy.deepcopy(model, memo)

    @contextmanager
    def gathered(self) -> Iterator[D2SModel]:
        """The model in eval mode, with all weights, inside a block that all workers enter together.

        Under ZeRO 3 each worker holds all weights during the block. Running statistics that workers compute apart
        (model.compat_batch_norm) become those of worker 0, so that all workers evaluate one model.
        """
        broadcast_running_statistics(self._model)
        if self._copy is None:
            self._model.eval()
            yield self._model
            return
        from deepspeed.runtime.zero import GatheredParameters

        pairs = list(zip(self._model.parameters(), self._copy.parameters(), strict=True))
        with GatheredParameters([parameter for parameter, _ in pairs]), torch.no_grad():
            try:
                for parameter, borrowed in pairs:
                    borrowed.data = parameter.data
                yield self._copy.eval()  # eval() also empties the caches of the pooling operators
            finally:
                for _, borrowed in pairs:
                    borrowed.data = torch.empty(0, dtype=borrowed.dtype, device=borrowed.device)
