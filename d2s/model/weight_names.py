"""Names of a tower's weights: those of the installed transformers, and those of the hub's files.

Releases of transformers rename modules inside; checkpoints on the hub keep the old names, and transformers
maps between the two. A saved model uses the hub's names and so can be read by another release.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion


def public_names(tower: PreTrainedModel) -> dict[str, str]:
    """Installed name -> name in the hub's files, for every weight and buffer of the tower.

    The identity where a kind of tower merges or splits weights instead of renaming them.
    """
    names = list(tower.state_dict())
    # Numbered stand-ins for the weights: where they come out tells how each was renamed.
    numbered = {name: torch.full((1,), number) for number, name in enumerate(names)}
    renamed = revert_weight_conversion(tower, numbered)
    pairs = {names[int(value)]: name for name, value in renamed.items() if value.numel() == 1}
    return pairs if len(pairs) == len(names) == len(renamed) else {name: name for name in names}


def to_public(state: dict[str, Tensor], prefix: str, tower: PreTrainedModel) -> dict[str, Tensor]:
    """Rename the tower's entries (those with the prefix) to the hub's names."""
    names = {prefix + own: prefix + public for own, public in public_names(tower).items()}
    return {names.get(name, name): value for name, value in state.items()}


def from_public(state: dict[str, Tensor], prefix: str, tower: PreTrainedModel) -> dict[str, Tensor]:
    """Rename the tower's entries from the hub's names to those of the installed transformers."""
    names = {prefix + public: prefix + own for own, public in public_names(tower).items()}
    return {names.get(name, name): value for name, value in state.items()}
