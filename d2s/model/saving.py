"""Saves and loads model folders, which contain model.safetensors, config.json and the tokenizer's files."""

import dataclasses
import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from d2s.common.files import read_json
from d2s.model.config import ModelConfig, TowerConfig
from d2s.model.hub import one_line, reason
from d2s.model.towers import resize_positions
from d2s.model.weight_names import from_hub, to_hub

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def _self_contained(config: TowerConfig, tower: PreTrainedModel) -> TowerConfig:
    """Replaces the name in the tower's settings by the tower's full Hugging Face configuration."""
    fields = json.loads(tower.config.to_json_string(use_diff=False))
    fields.pop("_name_or_path", None)
    return dataclasses.replace(config, name=None, config=fields, pretrained=False, layers=None)


def write(folder: Path, config: ModelConfig, tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> None:
    """Writes a model folder. The weights are written last, so a folder with weights is complete.

    config.json contains the full configurations of both towers instead of their names. The towers' weights
    get the names that files on the hub use.
    """
    towers = ("image_encoder", "text_encoder")
    parts = {name: _self_contained(getattr(config, name), getattr(model, name).tower) for name in towers}
    config = dataclasses.replace(config, **parts)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config.to_dict(), indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # These settings remain from the tokenizer's last call. Resetting makes files of equal models equal.
        backend.no_padding()
        backend.no_truncation()
    tokenizer.save_pretrained(folder)
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(to_hub(model, state), folder / WEIGHTS, metadata={"format": "pt"})


def find_folder(name: str | Path) -> Path:
    """Returns the folder of a saved model. If `name` is not a local folder, downloads it from the hub.

    Raises ValueError, with a message of one line, if there is no such model or a file is missing.
    """
    folder = Path(name) if Path(name).is_dir() else _download(str(name))
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise ValueError(f"model {str(name)!r}: has no {file}, give a folder that save_pretrained wrote")
    return folder


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.model", WEIGHTS]))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ValueError(f"model {name!r}: not a folder, and not available from the hub") from error


def read_config(folder: Path) -> ModelConfig:
    """Reads the settings of a saved model. Raises ValueError if config.json is missing or invalid."""
    path = folder / CONFIG
    fields = read_json(path)
    try:
        return ModelConfig.from_dict(fields)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {one_line(error)}") from error


def load_weights(model: nn.Module, folder: Path) -> None:
    """Loads the weights of a saved model. Raises ValueError if they are unreadable or do not fit."""
    source = folder / WEIGHTS
    try:
        state = load_file(source)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{source}: {reason(error, source)}") from error
    load_hub_state(model, state, source)


def load_hub_state(model: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Loads a state, whose entries have the hub's names, into the model.

    The state or the model may lack a decoder. Position embeddings are resized if their number differs.
    Raises ValueError, with `source` and the first entry that does not fit.
    """
    state, own = from_hub(model, state), model.state_dict()
    if not any(name.startswith("decoder.") for name in state):
        state |= {name: value for name, value in own.items() if name.startswith("decoder.")}
    if not any(name.startswith("decoder.") for name in own):
        state = {name: value for name, value in state.items() if not name.startswith("decoder.")}
    for name in sorted(own.keys() | state.keys()):
        if name not in state:
            raise ValueError(f"{source}: has no {name}, it belongs to a model of another configuration")
        if name not in own:
            raise ValueError(f"{source}: holds {name}, which a model of this configuration does not have")
        given, wanted = state[name].shape, own[name].shape
        if given == wanted:
            continue
        rows_differ = given[:-2] == wanted[:-2] and given[-1:] == wanted[-1:] and given[-2] > 0
        if not (name.endswith("position_embeddings") and rows_differ):
            raise ValueError(f"{source}: {name} has shape {tuple(given)}, the model {tuple(wanted)}")
        state[name] = resize_positions(state[name], wanted[-2])
    model.load_state_dict(state)
