"""Builds towers: Hugging Face encoders from the hub, a folder or a Python package, or with random weights."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from d2s.model.batch_norm import share_statistics
from d2s.model.config import TowerConfig

PACKAGE = "package:"
# Errors that transformers and torch raise if the sizes in a configuration do not fit each other.
_BUILD_ERRORS = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, AssertionError,
)  # fmt: skip


@contextmanager
def quiet() -> Iterator[None]:
    """Hides transformers' progress bars and its list of unused weights inside a `with` block."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def one_line(error: Exception) -> str:
    """Returns the first line of an error's message, or the name of its type if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def locate(name: str) -> str:
    """Returns the path of a folder named `package:<module>/<folder>`; returns other names unchanged.

    Raises ValueError if the package is not installed or has no such folder.
    """
    if not name.startswith(PACKAGE):
        return name
    module, _, folder = name.removeprefix(PACKAGE).partition("/")
    spec = find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"tower name {name!r}: package {module!r} is not installed, install it with pip")
    path = Path(spec.submodule_search_locations[0], folder)
    if not path.is_dir():
        raise ValueError(f"tower name {name!r}: the package has no folder {folder!r}")
    return str(path)


def reachable(name: str) -> str:
    """Returns `locate(name)` if it is a folder or in the cache, or if the hub can be reached.

    Raises ValueError otherwise. Without a network, the hub's client would fail only after half a minute.
    """
    path, host = locate(name), urlsplit(ENDPOINT).hostname
    if Path(path).is_dir() or HF_HUB_OFFLINE or "https" in getproxies():
        return path
    try:
        if not try_to_load_from_cache(path, "config.json"):
            socket.getaddrinfo(host, 443)
    except HFValidationError as error:
        reason = "there is no such folder, and no such name on the hub"
        raise ValueError(f"tower name {name!r}: {reason}") from error
    except OSError as error:
        reason = f"not a folder, not in the cache, and {host} cannot be reached"
        raise ValueError(f"tower name {name!r}: {reason}") from error
    return path


def _named_config(tower: TowerConfig) -> PreTrainedConfig:
    """Returns the configuration that `tower.config` or `tower.name` describes, without changes."""
    if tower.config is not None:
        fields = {key: value for key, value in tower.config.items() if key != "model_type"}
        try:
            return AutoConfig.for_model(tower.config["model_type"], **fields)
        except (ValueError, TypeError, StrictDataclassError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"tower.config of a {tower.config['model_type']}: {reason}") from error
    path = reachable(tower.name)
    try:
        with quiet():
            return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = f"not a folder, and not available from the hub ({one_line(error)})"
        raise ValueError(f"tower name {tower.name!r}: {reason}") from error


def tower_config(tower: TowerConfig, **changes: int) -> PreTrainedConfig:
    """Returns the full Hugging Face configuration of a tower.

    `changes` (image_size, vocab_size) apply only to random weights, and to fields that the configuration has.
    Raises ValueError on an unknown name, model type or field, or on fewer layers than `tower.layers`.
    """
    config = _named_config(tower)
    if tower.layers is not None:
        count = getattr(config, "num_hidden_layers", None)
        if count is None or tower.layers > count:
            raise ValueError(f"tower.layers={tower.layers!r}: {config.model_type} has {count} layers to keep")
        config.num_hidden_layers = tower.layers
    if tower.name is None or not tower.pretrained:
        for key, value in changes.items():
            if hasattr(config, key):
                setattr(config, key, value)
    return config


def _encoder(model: nn.Module, kind: str) -> nn.Module:
    """Returns the encoder in a two-tower model (CLIP, SigLIP) or an encoder-decoder, else the model."""
    half = getattr(model, f"{kind}_model", None)
    if isinstance(half, nn.Module) and hasattr(model, "logit_scale"):
        return half
    if getattr(model.config, "is_encoder_decoder", False):
        return model.get_encoder()
    return model


def _remove_unused(model: nn.Module) -> nn.Module:
    """Removes or freezes parameters that do not affect the tokens: they would get no gradient."""
    pooler = getattr(model, "pooler", None)
    if isinstance(pooler, nn.Module) and any(True for _ in pooler.parameters()):
        model.pooler = None
    for name, parameter in model.named_parameters():
        if name.endswith("mask_token"):
            parameter.requires_grad_(False)
    return model


def build_tower(tower: TowerConfig, kind: str, **changes: int) -> PreTrainedModel:
    """Builds the encoder that `tower` describes. kind: "vision" or "text". changes: see `tower_config`.

    The position embeddings of a pretrained vision tower are resized to `changes["image_size"]` pixels.
    Raises ValueError on an unknown name, model type or field, or on sizes that do not fit each other.
    """
    config = tower_config(tower, **changes)
    with quiet():
        if tower.name is not None and tower.pretrained:
            try:
                # Some checkpoints are stored in half precision, but training needs float32 weights.
                model = AutoModel.from_pretrained(
                    locate(tower.name), config=config, dtype=torch.float32, trust_remote_code=False
                )
            except (OSError, ValueError) as error:
                raise ValueError(f"tower name {tower.name!r}: {one_line(error)}") from error
        else:
            try:
                model = AutoModel.from_config(config, dtype=torch.float32)
            except _BUILD_ERRORS as error:
                what = f"tower.config of a {config.model_type}"
                raise ValueError(f"{what}: no such model ({one_line(error)})") from error
    model = _encoder(model, kind)
    if kind == "vision":
        model = share_statistics(resize_input(model, changes["image_size"]))
    model = _remove_unused(model)
    if tower.freeze:
        model.requires_grad_(False)
    return model


def resize_input(model: PreTrainedModel, size: int) -> PreTrainedModel:
    """Returns the tower for square images of `size` pixels, with resized position embeddings."""
    before = getattr(model.config, "image_size", None)
    if before is None or before in (size, [size, size], (size, size)):
        return model
    config = type(model.config).from_dict({**model.config.to_dict(), "image_size": size})
    resized = type(model)(config)
    shapes = {name: value.shape for name, value in resized.state_dict().items()}
    state = model.state_dict()
    for name, value in state.items():
        if value.shape != shapes[name]:
            state[name] = resize_positions(value, shapes[name][-2])
    resized.load_state_dict(state)
    return resized.to(next(model.parameters()).dtype)


def resize_positions(table: Tensor, count: int) -> Tensor:
    """Resizes position embeddings (..., n, C), extra tokens (CLS) and then a square grid, to (..., count, C).

    The grid is resized bicubically; the extra tokens stay. Raises ValueError if the grid cannot be square.
    """
    rows, channels = table.shape[-2:]
    old, new = int(rows**0.5), int(count**0.5)
    extra = rows - old * old
    if count - new * new != extra:
        raise ValueError(f"position embeddings: {rows} cannot be brought to {count}, neither grid is square")
    flat = table.reshape(rows, channels)
    grid = flat[extra:].view(1, old, old, channels).movedim(3, 1)
    grid = nn.functional.interpolate(grid.float(), size=(new, new), mode="bicubic", align_corners=False)
    grid = grid.movedim(1, 3).reshape(new * new, channels).to(table.dtype)
    return torch.cat([flat[:extra], grid]).view(*table.shape[:-2], count, channels)


def tower_width(model: PreTrainedModel) -> int:
    """Returns the width C of the tower's output tokens. Raises ValueError if the configuration lacks it."""
    config = model.config
    sizes = getattr(config, "hidden_sizes", None) or getattr(config, "channels", None)
    width = sizes[-1] if isinstance(sizes, (list, tuple)) else getattr(config, "hidden_size", None)
    if width is None:
        raise ValueError(f"tower.config.model_type={config.model_type!r}: it does not tell its tokens' width")
    return int(width)
