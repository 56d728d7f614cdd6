"""Gives access to the state of a DeepSpeed engine as slices of named flat tensors, for any ZeRO stage.

ZeRO divides weights and AdamW's moments among W workers. Stage 0 divides nothing. Stages 1 and 2 concatenate
the parameters of a group and divide the result. Stage 3 divides each parameter. A :class:`TensorSlice` is a
view of the engine's memory, with the name of the tensor and the index of the first element. A checkpoint of
such slices fits any stage and any W, so a run can resume with another stage or W. Nothing is gathered.

Before a save, worker 0 broadcasts its BatchNorm buffers (:mod:`d2s.model.running_statistics`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TensorSlice:
    """Holds the elements from index `start` to start + len(values) - 1 of the flattened tensor `name`."""

    name: str
    start: int
    values: Tensor
    """Flat view of the engine's memory. Writing to this view changes the engine's state."""
    replicated: bool
    """True if every worker holds the same slice. If False, no other worker holds any of these elements."""


class ZeroState:
    """Accesses the weights, the moments of AdamW, and the buffers of a DeepSpeed engine of any ZeRO stage.

    Raises ValueError if this class cannot access the optimizer that engine.deepspeed_json selects.
    """

    def __init__(self, engine: Any) -> None:
        from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

        self._engine, self._module, self._optimizer = engine, engine.module, engine.optimizer
        if isinstance(self._optimizer, DeepSpeedZeroOptimizer_Stage3):
            self.stage = 3
        elif isinstance(self._optimizer, DeepSpeedZeroOptimizer):
            self.stage = 1  # or 2, which also divides the gradients
        elif isinstance(self._optimizer, torch.optim.Optimizer):
            self.stage = 0
        else:
            raise ValueError(
                f"engine.deepspeed_json: a {type(self._optimizer).__name__} holds its state in a way that no "
                "checkpoint can keep: set engine.precision and engine.zero_stage instead"
            )
        self._adamw = self._optimizer.optimizer if self.stage else self._optimizer
        self._create_moments()

    def _create_moments(self) -> None:
        """Sets the moments to zero for all parameters that AdamW has not updated yet."""
        stepped = [flat for group in self._adamw.param_groups for flat in group["params"]]
        if self.stage == 3:  # param_groups contain flat tensors only during an update
            stepped = self._optimizer.fp32_partitioned_groups_flat
        for flat in stepped:
            state = self._adamw.state[flat]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state.update({key: torch.zeros_like(flat.data) for key in MOMENTS})

    @property
    def steps(self) -> int:
        """Returns how many updates AdamW made. Takes the maximum, as some parameters may lack gradients."""
        return max(int(state["step"]) for state in self._adamw.state.values())

    def element_counts(self) -> dict[str, int]:
        """Returns a dictionary from the tensors' names in a checkpoint to their numbers of elements."""
        counts = {}
        for name, parameter in self._module.named_parameters():
            count = getattr(parameter, "ds_numel", parameter.numel())
            for kind in ("weight", *MOMENTS) if parameter.requires_grad else ("weight",):
                counts[f"{kind}/{name}"] = count
        return counts | {f"buffer/{name}": buffer.numel() for name, buffer in self._buffers()}

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        persistent = self._module.state_dict().keys()
        return ((name, buffer) for name, buffer in self._module.named_buffers() if name in persistent)

    def slices(self) -> Iterator[TensorSlice]:
        """Yields this worker's slices: parameters, then buffers. A training step makes the slices invalid."""
        parts = {0: self._undivided, 1: self._part_of_group, 3: self._part_of_tensor}[self.stage]
        for name, parameter in self._module.named_parameters():
            replicated = self.stage == 0 or (self.stage == 1 and not parameter.requires_grad)
            for kind, (start, values) in parts(parameter).items():
                if len(values):
                    yield TensorSlice(f"{kind}/{name}", start, values, replicated)
        for name, buffer in self._buffers():
            yield TensorSlice(f"buffer/{name}", 0, _flat(buffer), True)

    def _undivided(self, parameter: nn.Parameter) -> dict[str, tuple[int, Tensor]]:
        """Returns all elements of a parameter and its moments, as `_part_of_group` does. For stage 0."""
        tensors = {"weight": parameter.data}
        if parameter.requires_grad:
            tensors |= {key: self._adamw.state[parameter][key] for key in MOMENTS}
        return {kind: (0, _flat(values)) for kind, values in tensors.items()}

    def _part_of_group(self, parameter: nn.Parameter) -> dict[str, tuple[int, Tensor]]:
        """Returns this worker's part of a parameter and of its moments. For stages 1 and 2.

        The keys are "weight" and the moments' names. The values are (index of the first element, elements).
        """
        if not parameter.requires_grad:
            return {"weight": (0, _flat(parameter.data))}
        mapping = parameter._hp_mapping
        if mapping is None:
            return {}
        place = mapping.hp_fragment_address
        tensors = self._flat_tensors(
            self._optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        )
        first = mapping.lp_fragment_address.start
        return {kind: (first, values.narrow(0, place.start, place.numel)) for kind, values in tensors.items()}

    def _part_of_tensor(self, parameter: nn.Parameter) -> dict[str, tuple[int, Tensor]]:
        """Returns this worker's part of a parameter as `_part_of_group` does. For stage 3.

        Each parameter is padded and divided into W equal parts, of which worker r holds part r. The result
        does not contain the padding.
        """
        size = parameter.partition_numel()
        first = size * torch.distributed.get_rank()
        count = min(size, max(0, parameter.ds_numel - first))
        if not parameter.requires_grad:
            return {"weight": (first, parameter.ds_tensor.data.narrow(0, 0, count))}
        group, place, _ = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
        tensors = self._flat_tensors(self._optimizer.fp32_partitioned_groups_flat[group])
        return {kind: (first, values.narrow(0, place, count)) for kind, values in tensors.items()}

    def _flat_tensors(self, flat: Tensor) -> dict[str, Tensor]:
        """Returns the weights and moments of a parameter group. `flat` is the group's flat tensor."""
        return {"weight": flat.data} | {key: self._adamw.state[flat][key] for key in MOMENTS}

    def finish_restore(self, steps: int) -> None:
        """Copies the restored weights to the module. All workers call this together after filling all slices.

        steps: the number of AdamW's updates when the checkpoint was saved.
        """
        for state in self._adamw.state.values():
            state["step"].fill_(steps)
        self._engine.global_steps = steps
        if self.stage == 1:
            self._optimizer.update_lp_params()
        elif self.stage == 3:
            for group in range(len(self._optimizer.fp16_groups)):
                self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
            persistent = self._optimizer.persistent_parameters
            if persistent:  # small parameters stay gathered and still have their old values
                persistent[0].partition(persistent)
                persistent[0].all_gather(persistent)


def _flat(values: Tensor) -> Tensor:
    assert values.is_contiguous(), "a copy would not restore the engine"
    return values.view(-1)
