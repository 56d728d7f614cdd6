"""A model on disk: model.safetensors, config.json, and the files of its tokenizer."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from d2s.model.config import IdleSetting, ModelConfig, TowerConfig, idle_settings
from d2s.model.tokenizer import read_tokenizer
from d2s.model.towers import one_line, resize_positions
from d2s.model.weight_names import from_public, to_public

if TYPE_CHECKING:
    from d2s.model.d2s_model import D2SModel

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
TOWERS = ("image_encoder.tower.", "text_encoder.tower.")


def self_contained(model: D2SModel) -> ModelConfig:
    """The model's settings with the full configuration of both towers in place of their names."""

    def complete(tower: TowerConfig, built: PreTrainedModel) -> TowerConfig:
        fields = json.loads(built.config.to_json_string(use_diff=False))
        fields.pop("_name_or_path", None)
        return dataclasses.replace(tower, name=None, config=fields, pretrained=False, layers=None)

    return dataclasses.replace(
        model.config,
        image_encoder=complete(model.config.image_encoder, model.image_encoder.tower),
        text_encoder=complete(model.config.text_encoder, model.text_encoder.tower),
    )


def public_state(model: D2SModel) -> dict[str, Tensor]:
    """The model's state on the CPU, the towers' weights under the names that the hub uses."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    for prefix in TOWERS:
        state = to_public(state, prefix, model.get_submodule(prefix[:-1]))
    return state


def save(model: D2SModel, folder: Path) -> None:
    """Write the model to `folder`; the weights come last, so a folder that has them is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(self_contained(model).to_dict(), indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    backend = getattr(model.tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # The last call's padding and cut would be written along, and two saves of one model differ.
        backend.no_padding()
        backend.no_truncation()
    model.tokenizer.save_pretrained(folder)
    save_file(public_state(model), folder / WEIGHTS, metadata={"format": "pt"})


def find(name: str | Path) -> Path:
    """The folder of a saved model: a local one, or the hub's, downloaded. ValueError where there is none."""
    folder = Path(name)
    if not folder.is_dir():
        folder = _download(str(name))
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
        raise ValueError(f"model {name!r}: not a folder, and not to be had from the hub") from error


def read_config(folder: Path) -> ModelConfig:
    """The settings of the saved model in `folder`. ValueError, in one line, where they are none."""
    try:
        return ModelConfig.from_dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"{folder / CONFIG}: {error.strerror or one_line(error)}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / CONFIG}: not JSON ({one_line(error)})") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG}: {one_line(error)}") from error


def load(cls: type[D2SModel], name: str | Path, changes: dict[str, object]) -> D2SModel:
    """See `D2SModel.from_pretrained`."""
    folder = find(name)
    config = dataclasses.replace(read_config(folder), **changes)
    try:
        state = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / WEIGHTS}: {one_line(error)}") from error
    tokenizer = read_tokenizer(folder, f"model {str(folder)!r}")
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", IdleSetting
        )  # its towers are to get their weights, and its maker was told
        model = cls(config, tokenizer)
    for line in idle_settings(config, changes.keys()):
        warnings.warn(line, IdleSetting, stacklevel=3)
    put_state(model, state, str(folder / WEIGHTS))
    return model.eval()


def put_state(model: D2SModel, state: dict[str, Tensor], source: str) -> None:
    """Put a public state into the model; the decoder may be missing as a whole, on either side, and position
    tables may differ in size.

    Raises ValueError naming `source` and the first key that does not fit.
    """
    for prefix in TOWERS:
        state = from_public(state, prefix, model.get_submodule(prefix[:-1]))
    own = model.state_dict()
    given, built = (any(name.startswith("decoder.") for name in names) for names in (state, own))
    for name in sorted(own.keys() | state.keys()):
        if name not in state:
            if name.startswith("decoder.") and not given:
                state[name] = own[name]
                continue
            raise ValueError(f"{source}: has no {name}, it belongs to a model of another configuration")
        if name not in own:
            if name.startswith("decoder.") and not built:
                del state[name]
                continue
            raise ValueError(f"{source}: holds {name}, which a model of this configuration does not have")
        if own[name].shape != state[name].shape:
            if not (
                name.endswith("position_embeddings") and _is_table_of(state[name].shape, own[name].shape)
            ):
                shapes = f"{tuple(state[name].shape)}, the model {tuple(own[name].shape)}"
                raise ValueError(f"{source}: {name} has shape {shapes}")
            state[name] = resize_positions(state[name], own[name].shape[-2])
    model.load_state_dict(state)


def _is_table_of(given: torch.Size, own: torch.Size) -> bool:
    """Whether two position tables differ in their number of positions only, so that one can be resized."""
    same = (len(given), given[:-2], given[-1:]) == (len(own), own[:-2], own[-1:])
    return same and len(own) >= 2 and given[-2] > 0


def push(model: D2SModel, repo_id: str, *, private: bool | None, token: str | None) -> str:
    """See `D2SModel.push_to_hub`."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    address = api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder))
        api.upload_folder(repo_id=repo_id, folder_path=folder)
    return str(address)
