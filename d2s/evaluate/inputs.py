"""Prepares the inputs of an evaluation: the device, the trained model, and its data settings."""

from pathlib import Path

import torch

from d2s.common.files import read_json
from d2s.data.config import DataConfig
from d2s.model import D2SModel
from d2s.workers.devices import in_full_precision


def choose_device(name: str) -> torch.device:
    """Turns TF32 off and returns the device `name`. "" means CUDA if available, else the CPU.

    Raises ValueError if the device does not exist or cannot be used.
    """
    in_full_precision()
    if not name:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, NotImplementedError, AssertionError, ImportError):
        count = torch.cuda.device_count()
        raise ValueError(
            f"--device {name}: cannot be used here ({count} CUDA devices): use cpu, cuda or cuda:N"
        ) from None
    return device


def load_model(folder: Path) -> D2SModel:
    """Loads a model, in eval mode, from a folder that `save_pretrained` wrote.

    Raises ValueError if the folder contains no model. If it is a run folder, the message says so.
    """
    if (folder / "best" / "config.json").is_file():
        raise ValueError(f"--model {folder} is a run, not a model: use {folder / 'best'}")
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is no folder"
        raise ValueError(f"--model {folder} {what}: give a folder of save_pretrained, such as runs/NAME/best")
    return D2SModel.from_pretrained(folder)


def data_config_of(folder: Path, model: D2SModel) -> DataConfig:
    """Returns data settings that suit a model. `folder` is the model's folder, such as runs/NAME/best.

    The image size comes from the model. The limits of word pieces and the number of loader processes come
    from config.json in the run folder that contains `folder`. Missing values have their defaults.

    Raises ValueError if the run's config.json is not JSON or has an invalid value.
    """
    path = folder.resolve().parent / "config.json"
    values = read_json(path).get("config", {}).get("data", {}) if path.is_file() else {}
    names = ("max_words_sparse", "max_words_dense", "loader_workers")
    chosen = {name: values[name] for name in names if name in values}
    return DataConfig(image_size=model.config.image_size, **chosen)
