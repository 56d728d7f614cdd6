"""Builds towers: Hugging Face encoders from the hub, a folder or a Python package, or with random weights."""

import pickle
import sys
from collections.abc import Iterable

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from d2s.model.batch_norm import share_statistics
from d2s.model.config import TowerConfig
from d2s.model.hub import locate, one_line, quiet, reachable, reason
from d2s.workers.group import rank

# Errors that transformers and torch raise if the sizes in a configuration contradict each other.
_BUILD_ERRORS = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, AssertionError,
)  # fmt: skip
_LOAD_ERRORS = (*_BUILD_ERRORS, OSError, ImportError, EOFError, SafetensorError, pickle.UnpicklingError)
_NAMED = 3
"""Number of weights that an error message lists by name."""


def _named_config(tower: TowerConfig) -> PreTrainedConfig:
    """Returns the unchanged configuration that `tower.config` or `tower.name` selects. Raises ValueError."""
    if tower.config is not None:
        fields = {key: value for key, value in tower.config.items() if key != "model_type"}
        try:
            return AutoConfig.for_model(tower.config["model_type"], **fields)
        except (ValueError, TypeError, StrictDataclassError) as error:
            why = " ".join(str(error).split())
            raise ValueError(f"tower.config of a {tower.config['model_type']}: {why}") from error
    path = reachable(tower.name)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        why = f"no configuration in the folder or on the hub ({reason(error, path)})"
        raise ValueError(f"tower name {tower.name!r}: {why}") from error


def tower_config(tower: TowerConfig, **changes: int) -> PreTrainedConfig:
    """Returns the full Hugging Face configuration of a tower.

    `changes` (image_size, vocab_size) replace fields that the configuration has, but only for random weights.
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
    """Returns one half of a CLIP-like model, the encoder of an encoder-decoder, or else the model itself."""
    half = getattr(model, f"{kind}_model", None)
    if isinstance(half, nn.Module) and hasattr(model, "logit_scale"):
        return half
    if getattr(model.config, "is_encoder_decoder", False):
        return model.get_encoder()
    return model


def _has_effect(name: str, value: Tensor) -> bool:
    """Returns whether a checkpoint must contain this weight: it is a float that affects the tokens."""
    return value.is_floating_point() and not name.startswith("pooler.") and not name.endswith("mask_token")


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
    """Builds the encoder that `tower` describes. kind: "vision" or "text". changes: as in `tower_config`.

    The position embeddings of a pretrained vision tower are resized to `changes["image_size"]` pixels.
    Raises ValueError on an unknown name, model type or field, or on sizes that do not fit each other.
    """
    config = tower_config(tower, **changes)
    if tower.name is not None and tower.pretrained:
        model = _load(tower, kind, config)
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


def _load(tower: TowerConfig, kind: str, config: PreTrainedConfig) -> nn.Module:
    """Loads a tower with its pretrained weights, and prints their number on stderr.

    Raises ValueError if a weight that the tower needs is missing or has another shape, or if a file is damaged.
    """
    what, path = f"tower name {tower.name!r}", locate(tower.name)
    try:
        with quiet():
            # Checkpoints may be stored in half precision; training needs float32 weights.
            model, info = AutoModel.from_pretrained(
                path, config=config, dtype=torch.float32, trust_remote_code=False,
                output_loading_info=True, ignore_mismatched_sizes=True,
            )  # fmt: skip
    except _LOAD_ERRORS as error:
        raise ValueError(f"{what}: its weights cannot be read: {reason(error, path)}") from error
    encoder = _encoder(model, kind)
    stored = {name: value for name, value in _weights(model).items() if value.is_floating_point()}
    used = {id(value) for name, value in _weights(encoder).items() if _has_effect(name, value)}
    needed = {name for name, value in stored.items() if id(value) in used}
    shapes = {
        name: f"{name} {list(has)} instead of {list(own)}" for name, has, own in info["mismatched_keys"]
    }
    missing, unfit = needed & info["missing_keys"], needed & shapes.keys()
    if missing or unfit:
        parts = {
            f"of its {len(needed)} weights are missing": missing,
            "have another shape": {shapes[name] for name in unfit},
            f"of the folder are none of a {type(encoder).__name__}": info["unexpected_keys"],
        }
        faults = ", ".join(
            f"{len(names)} {fault} ({_first(names)})" for fault, names in parts.items() if names
        )
        raise ValueError(
            f"{what}: {faults}: give a folder with transformers' names of weights and the sizes of its config.json, "
            "or set pretrained to False to start from random weights"
        )
    if rank() == 0:
        unneeded = info["unexpected_keys"] | (stored.keys() - needed - info["missing_keys"])
        others = f", without {len(unneeded)} that it does not need ({_first(unneeded)})" if unneeded else ""
        print(f"{what}: {len(needed)} weights loaded, none missing{others}", file=sys.stderr, flush=True)
    return encoder


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Maps names to parameters and buffers, not copied. A shared tensor appears under each of its names."""
    return model.state_dict(keep_vars=True)


def _first(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def resize_input(model: PreTrainedModel, size: int) -> PreTrainedModel:
    """Returns `model`, or a copy with position embeddings resized for images of `size` x `size` pixels."""
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
    """Resizes position embeddings of shape (..., n, C) to shape (..., count, C).

    The n rows are those of extra tokens (such as CLS), which stay, then of a square grid, which is resized
    bicubically. Raises ValueError unless n and count are a square plus the same number of extra tokens.
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
    """Returns the width of the tower's output tokens. Raises ValueError if the configuration has no width."""
    config = model.config
    sizes = getattr(config, "hidden_sizes", None) or getattr(config, "channels", None)
    width = sizes[-1] if isinstance(sizes, (list, tuple)) else getattr(config, "hidden_size", None)
    if width is None:
        raise ValueError(f"tower.config.model_type={config.model_type!r}: it does not tell its tokens' width")
    return int(width)
