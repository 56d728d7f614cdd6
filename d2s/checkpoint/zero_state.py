"""What an engine has to remember, as named pieces of flat tensors, the same for every ZeRO stage.

ZeRO cuts weights and moments among W workers along its own buffers: stages 1 and 2 cut a group of parameters laid
end to end, stage 3 each parameter by itself, stage 0 nothing. A :class:`Piece` says which elements of which named
tensor a view into those buffers holds. So a checkpoint knows names and positions only, and any number of workers at
any stage can take from it what they hold. Nobody gathers anything.

A save first broadcasts the buffers of worker 0 (:mod:`d2s.model.running_statistics`), so all workers hold the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """Elements start .. start + len(values) - 1 of the flattened tensor `name`, as a view of live memory."""

    name: str
    start: int
    values: Tensor
    """(n,), what the engine itself works with: writing into it is restoring it."""
    shared: bool
    """Every worker holds this piece, whole; else the workers' pieces of a tensor follow each other."""


class ZeroState:
    """The state of a DeepSpeed engine of stage 0, 1, 2 or 3 around `AdamW`.

    Raises ValueError where the engine was told (by engine.deepspeed_json) to hold its state in another way.
    """

    def __init__(self, engine: Any) -> None:
        from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

        self._engine, self._module, self._optimizer = engine, engine.module, engine.optimizer
        if isinstance(self._optimizer, DeepSpeedZeroOptimizer_Stage3):
            self.stage = 3
        elif isinstance(self._optimizer, DeepSpeedZeroOptimizer):
            self.stage = 1  # and 2, which differ in gradients only
        elif isinstance(self._optimizer, torch.optim.Optimizer):
            self.stage = 0
        else:
            raise ValueError(
                f"engine.deepspeed_json: a {type(self._optimizer).__name__} holds its state in a way that no "
                "checkpoint can keep: set engine.precision and engine.zero_stage instead"
            )
        self._adamw = self._optimizer.optimizer if self.stage else self._optimizer
        self._settle()

    def _settle(self) -> None:
        """Gives AdamW its moments, all zero, where it has not made a step yet."""
        stepped = [flat for group in self._adamw.param_groups for flat in group["params"]]
        if self.stage == 3:  # there the groups hold them while they are being stepped only
            stepped = self._optimizer.fp32_partitioned_groups_flat
        for flat in stepped:
            state = self._adamw.state[flat]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state.update({key: torch.zeros_like(flat.data) for key in MOMENTS})

    @property
    def steps(self) -> int:
        """Steps that AdamW has made; a parameter that never had a gradient counts for none."""
        return max(int(state["step"]) for state in self._adamw.state.values())

    def sizes(self) -> dict[str, int]:
        """Names and numbers of elements of everything that must be remembered, the same on every worker."""
        sizes = {}
        for name, parameter in self._module.named_parameters():
            count = getattr(parameter, "ds_numel", parameter.numel())
            for kind in ("weight", *MOMENTS) if parameter.requires_grad else ("weight",):
                sizes[f"{kind}/{name}"] = count
        return sizes | {f"buffer/{name}": buffer.numel() for name, buffer in self._buffers()}

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        kept = self._module.state_dict().keys()
        return ((name, buffer) for name, buffer in self._module.named_buffers() if name in kept)

    def pieces(self) -> Iterator[Piece]:
        """What this worker holds, in the order of the model; valid until the next step."""
        for name, parameter in self._module.named_parameters():
            held = (self._whole, self._cut_group, None, self._cut_tensor)[self.stage](parameter)
            for kind, (start, values) in held.items():
                shared = self.stage == 0 or (self.stage == 1 and not parameter.requires_grad)
                if len(values):
                    yield Piece(f"{kind}/{name}", start, values, shared)
        for name, buffer in self._buffers():
            yield Piece(f"buffer/{name}", 0, _flat(buffer), True)

    def _whole(self, parameter: nn.Parameter) -> dict[str, tuple[int, Tensor]]:
        held = {"weight": parameter.data}
        if parameter.requires_grad:
            held |= {key: self._adamw.state[parameter][key] for key in MOMENTS}
        return {kind: (0, _flat(values)) for kind, values in held.items()}

    def _cut_group(self, parameter: nn.Parameter) -> dict[str, tuple[int, Tensor]]:
        """Stages 1 and 2: this worker's cut of the parameter's group may hold all of it, a part, or nothing."""
        if not parameter.requires_grad:
            return {"weight": (0, _flat(parameter.data))}
        mapping = parameter._hp_mapping
        if mapping is None:
            return {}
        flat = self._optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        held = {"weight": flat.data} | {key: self._adamw.state[flat][key] for key in MOMENTS}
        first, place = mapping.lp_fragment_address.start, mapping.hp_fragment_address
        return {kind: (first, values.narrow(0, place.start, place.numel)) for kind, values in held.items()}

    def _cut_tensor(self, parameter: nn.Parameter) -> dict[str, tuple[int, Tensor]]:
        """Stage 3: worker r holds the r-th of W equal cuts, the last ones padded beyond the parameter's end."""
        size = parameter.partition_numel()
        first = size * torch.distributed.get_rank()
        count = min(size, max(0, parameter.ds_numel - first))
        if not parameter.requires_grad:
            return {"weight": (first, parameter.ds_tensor.data.narrow(0, 0, count))}
        group, place, _ = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
        flat = self._optimizer.fp32_partitioned_groups_flat[group]
        held = {"weight": flat.data} | {key: self._adamw.state[flat][key] for key in MOMENTS}
        return {kind: (first, values.narrow(0, place, count)) for kind, values in held.items()}

    def restored(self, steps: int) -> None:
        """To be called by all workers once every piece has been filled: the model takes over its weights."""
        for state in self._adamw.state.values():
            state["step"].fill_(steps)
        self._engine.global_steps = steps
        if self.stage == 1:
            self._optimizer.update_lp_params()
        elif self.stage == 3:
            for group in range(len(self._optimizer.fp16_groups)):
                self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
            kept = self._optimizer.persistent_parameters
            if kept:  # small ones lie whole on every worker between steps, and would be the old ones
                kept[0].partition(kept)
                kept[0].all_gather(kept)


def _flat(values: Tensor) -> Tensor:
    assert values.is_contiguous(), "a view would be a copy"
    return values.view(-1)
