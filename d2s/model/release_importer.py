"""Import a checkpoint of the authors' release: `python -m d2s.compat CKPT --out DIR`.

The layout was read from the release of D2S-VSE (arXiv 2503.14953). Its file is a pickle, so it is opened by a
loader that admits tensors, plain containers and argparse.Namespace, and runs nothing. The model is written with
the compat switches on, which give the release's behaviour in evaluation; `--ours` leaves them off.

No switch is needed for the release's padding inside the pooling operator (-10000 before the sort, 0 after): it
gives what masking gives, as long as no feature lies below -10000. Its OpenCV resize (bilinear, not antialiased)
belongs to the reading of images and is not reproduced here.
"""

from __future__ import annotations

import argparse
import pickle
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2s.common import command
from d2s.common.command import positive
from d2s.model import D2SModel, DecoderConfig, ModelConfig, TowerConfig
from d2s.model.saving import put_state
from d2s.model.towers import one_line

IGNORED = ("long_txt_enc.", "txt_enc.mlp.bns.1.", "prompt_learner.mask_token")
IGNORED_PARTS = (".pooler.", ".position_ids", ".relative_position_index", ".num_batches_tracked")
# Prefixes of the release -> ours.
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
HEAD = 64
"""Width of an attention head in ViT-B and BERT-base, which the weights alone do not tell."""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read the release's `model_best.pth` without running anything that it holds.

    Raises ValueError in one line where the file is missing, holds anything but tensors, plain containers and
    argparse.Namespace, or has not the layout of the release.
    """
    if not path.is_file():
        raise ValueError(f"checkpoint {str(path)!r}: no such file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"checkpoint {str(path)!r}: refused, {_reason(error)}") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"checkpoint {str(path)!r}: damaged ({one_line(error)})") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError(
            f"checkpoint {str(path)!r}: has no dictionary 'model', it is not the release's layout"
        )
    for name, value in content["model"].items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"checkpoint {str(path)!r}: 'model' holds {name!r}, which is not a named tensor")
        if value.layout != torch.strided or value.is_complex() or value.is_quantized or value.is_meta:
            raise ValueError(
                f"checkpoint {str(path)!r}: weight {name!r} is not a plain tensor of real numbers"
            )
    return content


def _reason(error: Exception) -> str:
    """The part of torch's long message that says what was refused."""
    for line in str(error).splitlines():
        if "GLOBAL" in line or "Unsupported" in line:
            return line.strip().split(" was not an allowed")[0].split("WeightsUnpickler error: ")[-1]
    return one_line(error)


def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The release's weights under our names (towers as on the hub). ValueError names a weight that has no place."""
    out = {}
    for full, value in state.items():
        name = full.removeprefix("module.")
        if name.startswith(IGNORED) or any(part in name for part in IGNORED_PARTS):
            continue
        theirs = next((prefix for prefix in RENAMED if name.startswith(prefix)), None)
        if theirs is None:
            raise ValueError(f"checkpoint: weight {full!r} is not part of the release's layout")
        ours, rest = RENAMED[theirs], name.removeprefix(theirs)
        if ours.endswith(".pool."):
            rest = _pool_name(rest)
        elif ours == "decoder.blocks.":
            rest = rest.replace(".mlp.", ".")
        out[ours + rest] = value
    if any(name.startswith("text_encoder.mlp.norm.") for name in out):
        out["text_encoder.mlp.norm.num_batches_tracked"] = torch.tensor(0)
    return out


def _pool_name(name: str) -> str:
    if name == "linear.weight":
        return "weights.score"
    back = name.endswith("_reverse")
    return f"weights.{'back' if back else 'ahead'}_{name.removeprefix('gru.').split('_l0')[0]}"


def _count(state: dict[str, Tensor], prefix: str) -> int:
    """How many numbered modules there are under the prefix."""
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})


def _shape(state: dict[str, Tensor], name: str, dims: int) -> torch.Size:
    """The shape of a weight. KeyError where it is missing, ValueError where it has not so many dimensions."""
    shape = state[name].shape
    if len(shape) != dims or 0 in shape:
        raise ValueError(f"checkpoint: {name} has shape {tuple(shape)}, the release's has {dims} dimensions")
    return shape


def _vit_fields(state: dict[str, Tensor], at: str, size: int) -> dict[str, Any]:
    patch = _shape(state, at + "embeddings.patch_embeddings.projection.weight", 4)
    return {
        "model_type": "vit",
        "hidden_size": patch[0],
        "patch_size": patch[-1],
        "image_size": size,
        "num_hidden_layers": _count(state, at + "encoder.layer."),
        "num_attention_heads": max(1, patch[0] // HEAD),
        "intermediate_size": _shape(state, at + "encoder.layer.0.intermediate.dense.weight", 2)[0],
    }


def _swin_fields(state: dict[str, Tensor], at: str, size: int) -> dict[str, Any]:
    patch = _shape(state, at + "embeddings.patch_embeddings.projection.weight", 4)
    stages = range(_count(state, at + "encoder.layers."))
    first = f"{at}encoder.layers.{{}}.blocks.0."
    name = first + "attention.self.relative_position_bias_table"
    tables = [_shape(state, name.format(stage), 2) for stage in stages]
    hidden = _shape(state, first.format(0) + "intermediate.dense.weight", 2)
    return {
        "model_type": "swin",
        "embed_dim": patch[0],
        "patch_size": patch[-1],
        "image_size": size,
        "depths": [_count(state, f"{at}encoder.layers.{stage}.blocks.") for stage in stages],
        "num_heads": [heads for _, heads in tables],
        "window_size": (round(tables[0][0] ** 0.5) + 1) // 2,
        "mlp_ratio": hidden[0] / hidden[1],
    }


def _bert_fields(state: dict[str, Tensor], at: str) -> dict[str, Any]:
    words = _shape(state, at + "embeddings.word_embeddings.weight", 2)
    return {
        "model_type": "bert",
        "vocab_size": words[0],
        "hidden_size": words[1],
        "num_hidden_layers": _count(state, at + "encoder.layer."),
        "num_attention_heads": max(1, words[1] // HEAD),
        "intermediate_size": _shape(state, at + "encoder.layer.0.intermediate.dense.weight", 2)[0],
        "max_position_embeddings": _shape(state, at + "embeddings.position_embeddings.weight", 2)[0],
        "type_vocab_size": _shape(state, at + "embeddings.token_type_embeddings.weight", 2)[0],
    }


def _decoder_config(state: dict[str, Tensor], *, ours: bool) -> DecoderConfig | None:
    if not any(name.startswith("decoder.") for name in state):
        return None
    tokens, width = _shape(state, "decoder.tokens", 2)
    return DecoderConfig(
        tokens=tokens,
        # It has no effect and is noted for the record, together with the switches.
        layout="surround" if ours else "postfix",
        depth=_count(state, "decoder.blocks."),
        mlp_ratio=_shape(state, "decoder.blocks.0.fc1.weight", 2)[0] / width,
    )


def model_config(state: dict[str, Tensor], size: int, tokenizer: str, *, ours: bool = False) -> ModelConfig:
    """The configuration that fits a renamed state: shapes from the weights, the input size in pixels as given.

    Raises ValueError naming the weight that is missing or has not as many dimensions as the release's.
    """
    vision, text = "image_encoder.tower.", "text_encoder.tower."
    fields = _vit_fields if vision + "embeddings.cls_token" in state else _swin_fields
    try:
        return ModelConfig(
            width=_shape(state, "image_encoder.linear.weight", 2)[0],
            gpo_width=_shape(state, "image_encoder.pool.weights.score", 2)[1],
            image_size=size,
            image_encoder=TowerConfig(config=fields(state, vision, size), pretrained=False),
            text_encoder=TowerConfig(config=_bert_fields(state, text), pretrained=False, tokenizer=tokenizer),
            decoder=_decoder_config(state, ours=ours),
            compat_decoder_padding=not ours,
            compat_unit_prompt=not ours,
            compat_batch_norm=not ours,
        )
    except KeyError as error:
        raise ValueError(f"checkpoint: has no weight {error}, it is not the release's layout") from error


def convert(
    path: Path,
    *,
    tokenizer: str = "google-bert/bert-base-uncased",
    size: int | None = None,
    ours: bool = False,
) -> D2SModel:
    """The release's checkpoint as a model, in eval mode.

    size: side of the input image in pixels; None takes it from the checkpoint's options (`img_res`).
    Raises ValueError in one line where the checkpoint is refused or something does not fit.
    """
    content = read_checkpoint(path)
    size = size or getattr(content.get("opt"), "img_res", None)
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"checkpoint {str(path)!r}: does not tell its input size, give --image-size")
    state = rename(content["model"])
    model = D2SModel(model_config(state, size, tokenizer, ours=ours))
    put_state(model, state, str(path))
    return model.eval()


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0, or 2 after one line on what is wrong; a usage error exits with 2."""
    parser = command.Parser(prog="python -m d2s.compat", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="the release's model_best.pth")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="new folder for the model")
    parser.add_argument("--tokenizer", default="google-bert/bert-base-uncased", metavar="NAME_OR_DIR")
    parser.add_argument(
        "--image-size", type=positive, metavar="PIXELS", help="default: img_res of the checkpoint"
    )
    parser.add_argument("--ours", action="store_true", help="leave the compat switches off")
    options = parser.parse_args(argv)
    return command.run(lambda: _import(options))


def _import(options: argparse.Namespace) -> None:
    """Convert and write, whole or not at all. Raises ValueError and OSError."""
    out: Path = options.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {str(out)!r}: exists and is not an empty folder, name a new one")
    model = convert(
        options.checkpoint, tokenizer=options.tokenizer, size=options.image_size, ours=options.ours
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        model.save_pretrained(Path(folder, "model"))
        Path(folder, "model").replace(out)
    print(f"wrote {out}: {sum(p.numel() for p in model.parameters()):,} weights, {options.checkpoint}")
