"""Imports a checkpoint of the authors' release of D2S-VSE (arXiv 2503.14953). The command is `d2s.compat`.

The checkpoint file is a pickle. It is read by a loader that executes no code and admits only tensors, plain
containers and argparse.Namespace. The imported model has the compat switches on, so that it reproduces the
release's evaluation. `--ours` leaves the switches off.

In its pooling operator, the release writes -10000 at padding before the sort and 0 after it. This gives the
same result as our mask unless a feature is below -10000, so it needs no switch. The release resizes images
with OpenCV (bilinear, not antialiased). We do not reproduce this.
"""

import argparse
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2s.model import D2SModel, DecoderConfig, ModelConfig, TowerConfig
from d2s.model.hub import one_line, reason
from d2s.model.saving import load_hub_state

IGNORED = ("long_txt_enc.", "txt_enc.mlp.bns.1.", "prompt_learner.mask_token")
IGNORED_PARTS = (".pooler.", ".position_ids", ".relative_position_index", ".num_batches_tracked")
# Maps name prefixes in the release to name prefixes in a D2SModel. Inside the towers, names are the hub's.
RENAMED = {
    "img_enc.visual_encoder.": "image_encoder.tower.",
    "img_enc.image_encoder.fc.": "image_encoder.linear.",
    "img_enc.image_encoder.gpool.": "image_encoder.pool.",
    "txt_enc.bert.": "text_encoder.tower.",
    "txt_enc.fc.": "text_encoder.linear.",
    "txt_enc.ln.": "text_encoder.norm.",
    "txt_enc.mlp.layers.0.": "text_encoder.mlp.inner.",
    "txt_enc.mlp.layers.1.": "text_encoder.mlp.outer.",
    "txt_enc.mlp.bns.0.": "text_encoder.mlp.norm.",
    "txt_enc.gpool.": "text_encoder.pool.",
    "prompt_learner.prompt_tokens": "decoder.tokens",
    "prompt_learner.decoder_blocks.": "decoder.blocks.",
    "prompt_learner.decoder_norm.": "decoder.norm.",
}
# VIT and BERT map a field of the Hugging Face configuration to (weight, dimension whose size is the value).
_PATCH = "embeddings.patch_embeddings.projection.weight"
_INNER = "encoder.layer.0.intermediate.dense.weight"
VIT = {"hidden_size": (_PATCH, 0), "patch_size": (_PATCH, 3), "intermediate_size": (_INNER, 0)}
BERT = {
    "vocab_size": ("embeddings.word_embeddings.weight", 0),
    "hidden_size": ("embeddings.word_embeddings.weight", 1),
    "intermediate_size": (_INNER, 0),
    "max_position_embeddings": ("embeddings.position_embeddings.weight", 0),
    "type_vocab_size": ("embeddings.token_type_embeddings.weight", 0),
}
TOKENIZER = "google-bert/bert-base-uncased"
HEAD_WIDTH = 64  # width of an attention head in ViT-B and BERT-base, which the weights' shapes do not show


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads the release's `model_best.pth` without executing code from the file.

    Raises ValueError, with a message of one line, if the file is missing or damaged, if it contains a type
    that the loader does not admit, or if it does not have the release's layout.
    """
    what = f"checkpoint {str(path)!r}"
    if not path.is_file():
        raise ValueError(f"{what}: no such file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{what}: refused, {reason(ValueError(_refused_part(error)), path)}") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"{what}: damaged ({one_line(error)})") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError(f"{what}: has no dictionary 'model', it is not the release's layout")
    for name, value in content["model"].items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{what}: 'model' holds {name!r}, which is not a named tensor")
        if value.layout != torch.strided or value.is_complex() or value.is_quantized or value.is_meta:
            raise ValueError(f"{what}: weight {name!r} is not a plain tensor of real numbers")
    return content


def _refused_part(error: Exception) -> str:
    """Extracts the part that names the refused type from torch's long error message."""
    for line in str(error).splitlines():
        if "GLOBAL" in line or "Unsupported" in line:
            return line.strip().split(" was not an allowed")[0].split("WeightsUnpickler error: ")[-1]
    return one_line(error)


def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames the release's weights to fit `load_hub_state`. Raises ValueError if a weight is unknown."""
    out = {}
    for full, value in state.items():
        name = full.removeprefix("module.")
        if name.startswith(IGNORED) or any(part in name for part in IGNORED_PARTS):
            continue
        theirs = next((prefix for prefix in RENAMED if name.startswith(prefix)), None)
        if theirs is None:
            raise ValueError(f"checkpoint: weight {full!r} is not part of the release's layout")
        ours, suffix = RENAMED[theirs], name.removeprefix(theirs)
        if ours.endswith(".pool."):
            direction = "back" if suffix.endswith("_reverse") else "ahead"
            gru = f"{direction}_{suffix.removeprefix('gru.').split('_l0')[0]}"
            suffix = "weights.score" if suffix == "linear.weight" else f"weights.{gru}"
        elif ours == "decoder.blocks.":
            suffix = suffix.replace(".mlp.", ".")
        out[ours + suffix] = value
    if any(name.startswith("text_encoder.mlp.norm.") for name in out):
        out["text_encoder.mlp.norm.num_batches_tracked"] = torch.tensor(0)
    return out


def _count(state: dict[str, Tensor], prefix: str) -> int:
    """Counts numbered modules: returns how many different numbers follow `prefix` in the weights' names."""
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})


def _size(state: dict[str, Tensor], name: str, dim: int) -> int:
    """Returns the size of a weight's dimension. Raises ValueError if weight or dimension is missing."""
    if name not in state:
        raise ValueError(f"checkpoint: has no weight {name!r}, it is not the release's layout")
    shape = tuple(state[name].shape)
    if len(shape) <= dim or 0 in shape:
        raise ValueError(
            f"checkpoint: {name} has shape {shape}, which is not possible in the release's layout"
        )
    return shape[dim]


def _transformer(state: dict[str, Tensor], at: str, kind: str, table: dict[str, tuple[str, int]]) -> dict:
    """Derives the Hugging Face configuration of a ViT or BERT. Its weights' names begin with `at`.

    kind: "vit" or "bert". table: `VIT` or `BERT`.
    """
    fields = {field: _size(state, at + name, dim) for field, (name, dim) in table.items()}
    heads = max(1, fields["hidden_size"] // HEAD_WIDTH)
    layers = _count(state, at + "encoder.layer.")
    return {"model_type": kind, "num_hidden_layers": layers, "num_attention_heads": heads, **fields}


def _swin(state: dict[str, Tensor], at: str) -> dict:
    """Derives the Hugging Face configuration of a Swin tower. Its weights' names begin with `at`."""
    stages = range(_count(state, at + "encoder.layers."))
    first = f"{at}encoder.layers.{{}}.blocks.0."
    table = first + "attention.self.relative_position_bias_table"
    inner = first.format(0) + "intermediate.dense.weight"
    return {
        "model_type": "swin",
        "embed_dim": _size(state, at + _PATCH, 0),
        "patch_size": _size(state, at + _PATCH, 3),
        "depths": [_count(state, f"{at}encoder.layers.{stage}.blocks.") for stage in stages],
        "num_heads": [_size(state, table.format(stage), 1) for stage in stages],
        # The table has (2 * window - 1) ** 2 rows.
        "window_size": (round(_size(state, table.format(0), 0) ** 0.5) + 1) // 2,
        "mlp_ratio": _size(state, inner, 0) / _size(state, inner, 1),
    }


def model_config(state: dict[str, Tensor], size: int, tokenizer: str, *, ours: bool = False) -> ModelConfig:
    """Derives the configuration from the shapes in a state that `rename` returned.

    size: side of the input image, in pixels. tokenizer: name or folder. ours: turn the compat switches off.
    Raises ValueError with the weight's name if a weight is missing or has an impossible shape.
    """
    vision, text, decoder = "image_encoder.tower.", "text_encoder.tower.", None
    vit = vision + "embeddings.cls_token" in state
    image = _transformer(state, vision, "vit", VIT) if vit else _swin(state, vision)
    if any(name.startswith("decoder.") for name in state):
        width = _size(state, "decoder.tokens", 1)
        decoder = DecoderConfig(
            tokens=_size(state, "decoder.tokens", 0),
            # The layout has no effect. With the compat switches, we record the release's layout.
            layout="surround" if ours else "postfix",
            depth=_count(state, "decoder.blocks."),
            mlp_ratio=_size(state, "decoder.blocks.0.fc1.weight", 0) / width,
        )
    bert = _transformer(state, text, "bert", BERT)
    return ModelConfig(
        width=_size(state, "image_encoder.linear.weight", 0),
        gpo_width=_size(state, "image_encoder.pool.weights.score", 1),
        image_size=size,
        image_encoder=TowerConfig(config={**image, "image_size": size}, pretrained=False),
        text_encoder=TowerConfig(config=bert, pretrained=False, tokenizer=tokenizer),
        decoder=decoder,
        compat_decoder_padding=not ours,
        compat_unit_prompt=not ours,
        compat_batch_norm=not ours,
    )


def convert(
    path: Path, *, tokenizer: str = TOKENIZER, size: int | None = None, ours: bool = False
) -> D2SModel:
    """Converts the release's checkpoint to a model in eval mode. Arguments: as in `model_config`.

    If `size` is None, it is read from the checkpoint's options (`img_res`).
    Raises ValueError, with a message of one line, if the checkpoint is refused or a weight does not fit.
    """
    content = read_checkpoint(path)
    size = size or getattr(content.get("opt"), "img_res", None)
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"checkpoint {str(path)!r}: does not tell its input size, give --image-size")
    state = rename(content["model"])
    model = D2SModel(model_config(state, size, tokenizer, ours=ours))
    load_hub_state(model, state, str(path))
    return model.eval()
