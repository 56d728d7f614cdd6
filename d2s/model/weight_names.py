"""Translates the names of a tower's weights between the installed transformers and files on the hub.

Releases of transformers rename modules, but files on the hub keep the old names. A saved model uses the hub's
names, so that other releases of transformers can read it.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

TOWERS = ("image_encoder.tower.", "text_encoder.tower.")


def hub_names(tower: PreTrainedModel) -> dict[str, str]:
    """Returns a dictionary from the installed names of the tower's weights and buffers to the hub's names.

    If transformers merges or splits weights of this model type, each name is mapped to itself.
    """
    names = list(tower.state_dict())
    # We give transformers a number instead of each weight. It returns the number under the hub's name.
    numbered = {name: torch.full((1,), number) for number, name in enumerate(names)}
    renamed = revert_weight_conversion(tower, numbered)
    pairs = {names[int(value)]: name for name, value in renamed.items() if value.numel() == 1}
    return pairs if len(pairs) == len(names) == len(renamed) else {name: name for name in names}


def to_hub(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replaces the installed names of both towers' weights in a state by the hub's names."""
    names = _all_names(model)
    return {names.get(name, name): value for name, value in state.items()}


def from_hub(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replaces the hub's names of both towers' weights in a state by the installed names."""
    names = {theirs: ours for ours, theirs in _all_names(model).items()}
    return {names.get(name, name): value for name, value in state.items()}


def _all_names(model: nn.Module) -> dict[str, str]:
    names = {}
    for prefix in TOWERS:
        pairs = hub_names(model.get_submodule(prefix[:-1]))
        names |= {prefix + ours: prefix + theirs for ours, theirs in pairs.items()}
    return names
