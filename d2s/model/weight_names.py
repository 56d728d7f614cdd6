"""Translates between the names of a tower's weights in the installed transformers and in files on the hub.

Releases of transformers rename modules, but files on the hub keep the old names, and transformers maps one to
the other. A saved model uses the hub's names, so that other releases of transformers can read it.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

TOWERS = ("image_encoder.tower.", "text_encoder.tower.")


def hub_names(tower: PreTrainedModel) -> dict[str, str]:
    """Maps the installed name of each weight and buffer of the tower to its name on the hub.

    Maps each name to itself if transformers merges or splits weights of this model type.
    """
    names = list(tower.state_dict())
    # Each weight is replaced by its number; the number comes back under the weight's name on the hub.
    numbered = {name: torch.full((1,), number) for number, name in enumerate(names)}
    renamed = revert_weight_conversion(tower, numbered)
    pairs = {names[int(value)]: name for name, value in renamed.items() if value.numel() == 1}
    return pairs if len(pairs) == len(names) == len(renamed) else {name: name for name in names}


def to_hub(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames the entries of both towers in a model's state to the names on the hub."""
    names = _all_names(model)
    return {names.get(name, name): value for name, value in state.items()}


def from_hub(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames the entries of both towers from the names on the hub to the installed names."""
    names = {theirs: ours for ours, theirs in _all_names(model).items()}
    return {names.get(name, name): value for name, value in state.items()}


def _all_names(model: nn.Module) -> dict[str, str]:
    names = {}
    for prefix in TOWERS:
        pairs = hub_names(model.get_submodule(prefix[:-1]))
        names |= {prefix + ours: prefix + theirs for ours, theirs in pairs.items()}
    return names
