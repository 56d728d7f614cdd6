"""Gives evaluation and export a model with all of its weights, under any ZeRO stage.

Under ZeRO 3, every forward of a module gathers its weights from all workers, so all workers must run the same
modules equally often. Evaluation does not: how often the pooling operator computes its weights, for example,
depends on a worker's caption lengths. So evaluation runs on a copy of the model that borrows all weights.
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
    """Gives access to all weights of a model in training. Create it before the engine adds hooks.

    model: the D2SModel inside the module that the engine gets. stage: the ZeRO stage, 0 to 3.
    """

    def __init__(self, model: D2SModel, stage: int) -> None:
        self._model, self._copy = model, None
        if stage == 3:
            # The copy shares the model's buffers. Its parameters are empty until `gathered` fills them.
            memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
            for parameter in model.parameters():
                empty = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
                memo[id(parameter)] = nn.Parameter(empty, requires_grad=False)
            self._copy = copy.deepcopy(model, memo)

    @contextmanager
    def gathered(self) -> Iterator[D2SModel]:
        """Yields the model in eval mode with all weights; all workers enter the `with` block together.

        Under ZeRO 3, each worker holds all weights during the block. If workers compute their own running
        statistics (model.compat_batch_norm), those of worker 0 replace the others.
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
