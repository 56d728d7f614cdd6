"""Counts the bytes that a forward pass saves for the backward pass."""

from typing import Any, Self

import torch
from torch import Tensor, nn


class SavedActivations:
    """A context manager. Counts the bytes that each forward pass of a module saves for its backward pass.

    A storage counts once, even if several tensors share it. The module's parameters do not count.

        with SavedActivations(module) as saved:
            module(batch)
        print(saved.most)
    """

    def __init__(self, module: nn.Module) -> None:
        self.most = 0
        """The largest number of bytes that one forward pass saved."""
        self._module = module
        self._sizes: dict[int, int] = {}
        self._parameters: set[int] = set()

    def __enter__(self) -> Self:
        self._handles = [
            self._module.register_forward_pre_hook(self._before),
            self._module.register_forward_hook(self._after),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, *_: object) -> None:
        self._parameters = {p.untyped_storage().data_ptr() for p in self._module.parameters()}
        self._sizes = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)
        self._hooks.__enter__()

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._parameters:
            self._sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    def _after(self, *_: Any) -> None:
        # The output keeps all saved storages alive until here. So two different storages never had the same address.
        self._hooks.__exit__(None, None, None)
        self.most = max(self.most, sum(self._sizes.values()))
