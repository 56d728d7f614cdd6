"""Names of a tower's weights: those of the installed transformers, and those of the files on the hub.

Releases of transformers rename modules; files on the hub keep the old names, and transformers maps between the
two. A saved model uses the hub's names, so that another release can read it.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

TOWERS = ("image_encoder.tower.", "text_encoder.tower.")


def hub_names(tower: PreTrainedModel) -> dict[str, str]:
    """Installed name -> name on the hub, for every weight and buffer of the tower.

    The identity for kinds of towers whose weights transformers merges or splits instead of renaming.
    """
    names = list(tower.state_dict())
    # One number stands for each weight: where it comes out shows how the weight was renamed.
    numbered = {name: torch.full((1,), number) for number, name in enumerate(names)}
    renamed = revert_weight_conversion(tower, numbered)
    pairs = {names[int(value)]: name for name, value in renamed.items() if value.numel() == 1}
    return pairs if len(pairs) == len(names) == len(renamed) else {name: name for name in names}


def to_hub(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the entries of both towers in a model's state to the names on the hub."""
    return _rename(state, _all_names(model))


def from_hub(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `to_hub`."""
    return _rename(state, {theirs: ours for ours, theirs in _all_names(model).items()})


def _all_names(model: nn.Module) -> dict[str, str]:
    names = {}
    for prefix in TOWERS:
        pairs = hub_names(model.get_submodule(prefix[:-1]))
        names |= {prefix + ours: prefix + theirs for ours, theirs in pairs.items()}
    return names


def _rename(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    return {names.get(name, name): value for name, value in state.items()}
