"""Gives evaluation and export a model with all of its weights, under any ZeRO stage.

Under ZeRO 3, every forward of a module gathers the module's weights from all workers. So all workers must run
the same modules equally often. In evaluation they do not. For example, the pooling operator runs its GRU more
often on a worker with more caption lengths. So evaluation uses a copy of the model that borrows all weights.
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
    """Gives access to all weights of a model in training.

    Create it before the DeepSpeed engine, because the engine adds hooks to the model.
    model: the D2SModel inside the module that the engine trains. stage: the ZeRO stage, 0 to 3.
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
        """Yields the model in eval mode with all weights. All workers must enter the `with` block together.

        Under ZeRO 3, each worker holds all weights during the block. All workers use the running statistics
        of worker 0, because with model.compat_batch_norm the statistics differ between workers.
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
