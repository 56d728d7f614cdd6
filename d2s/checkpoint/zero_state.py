"""Shows the state of a DeepSpeed engine as slices of named flat tensors, in one form for all ZeRO stages.

ZeRO divides weights and moments among W workers. Stages 1 and 2 divide each group of parameters,
concatenated; stage 3 divides each parameter by itself; stage 0 divides nothing. A :class:`TensorSlice` says
which elements of which named tensor a view of the engine's memory holds. A checkpoint therefore stores only
names and positions. Any number of workers, at any stage, can read their elements, and nothing is gathered.

Before a save, the BatchNorm buffers of worker 0 are broadcast (:mod:`d2s.model.running_statistics`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TensorSlice:
    """Elements start .. start + len(values) - 1 of the flattened tensor called `name`."""

    name: str
    start: int
    values: Tensor
    """(n,), a view of the engine's own memory: writing into this tensor restores the engine."""
    replicated: bool
    """True if every worker holds the same slice; otherwise the slices of different workers do not overlap."""


class ZeroState:
    """Accesses the weights, AdamW's moments and the buffers of a DeepSpeed engine of ZeRO stage 0, 1, 2 or 3.

    Raises ValueError if engine.deepspeed_json gave the engine an optimizer whose state cannot be saved.
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
        """Adds zero moments for all parameters that AdamW has not updated yet."""
        stepped = [flat for group in self._adamw.param_groups for flat in group["params"]]
        if self.stage == 3:  # param_groups hold the flat tensors only during a step
            stepped = self._optimizer.fp32_partitioned_groups_flat
        for flat in stepped:
            state = self._adamw.state[flat]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state.update({key: torch.zeros_like(flat.data) for key in MOMENTS})

    @property
    def steps(self) -> int:
        """Number of AdamW's steps: the maximum over parameters, as those without gradient count none."""
        return max(int(state["step"]) for state in self._adamw.state.values())

    def element_counts(self) -> dict[str, int]:
        """Returns the number of elements of each tensor in a checkpoint, by name; equal on all workers."""
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
        """Yields this worker's slices, in the order of the parameters. Valid until the next training step."""
        parts = {0: self._undivided, 1: self._part_of_group, 3: self._part_of_tensor}[self.stage]
        for name, parameter in self._module.named_parameters():
            replicated = self.stage == 0 or (self.stage == 1 and not parameter.requires_grad)
            for kind, (start, values) in parts(parameter).items():
                if len(values):
                    yield TensorSlice(f"{kind}/{name}", start, values, replicated)
        for name, buffer in self._buffers():
            yield TensorSlice(f"buffer/{name}", 0, _flat(buffer), True)

    def _undivided(self, parameter: nn.Parameter) -> dict[str, tuple[int, Tensor]]:
        """Stage 0: maps "weight" and each moment to (0, all elements of the parameter)."""
        tensors = {"weight": parameter.data}
        if parameter.requires_grad:
            tensors |= {key: self._adamw.state[parameter][key] for key in MOMENTS}
        return {kind: (0, _flat(values)) for kind, values in tensors.items()}

    def _part_of_group(self, parameter: nn.Parameter) -> dict[str, tuple[int, Tensor]]:
        """Stages 1 and 2: maps "weight" and each moment to (first index, elements) of this worker's part."""
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
        """Stage 3: returns the same as `_part_of_group`.

        Worker r holds the r-th of W equal parts of each parameter. The last parts end with padding, which is
        left out.
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
        """Returns the weights and the moments of one flat group of parameters."""
        return {"weight": flat.data} | {key: self._adamw.state[flat][key] for key in MOMENTS}

    def finish_restore(self, steps: int) -> None:
        """Copies the restored state to the module; all workers call it together once their slices are filled.

        steps: the number of AdamW's steps in the checkpoint.
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
            if persistent:  # small parameters stay gathered between steps, with their old values
                persistent[0].partition(persistent)
                persistent[0].all_gather(persistent)


def _flat(values: Tensor) -> Tensor:
    assert values.is_contiguous(), "a copy would not restore the engine"
    return values.view(-1)
