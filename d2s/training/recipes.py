"""Recipes: named functions, each returning a whole configuration. The number in a name is the input size.

The paper's files are called 224 and 384 but were trained at 384 and 480 pixels; the names here say what is fed.
`_compat` recipes switch on what the authors' release does differently, so that its numbers can be explained.
Small recipes start from random weights on a CPU. The hardest-negative hinge stalls there (from random weights
all similarities are alike, and the hardest negative is noise), so they align by InfoNCE.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

from d2s.data.batches import DataConfig
from d2s.losses.objective import LossConfig
from d2s.model import DecoderConfig, ModelConfig, TowerConfig, presets
from d2s.training.config import LogConfig, TrainConfig
from d2s.training.engine import EngineConfig
from d2s.training.optimizer import OptimConfig

PAPER_SIZES = {"vitb16": (224, 384, 480), "swinb": (224, 384)}


def paper(part: str, tower: str, size: int) -> TrainConfig:
    """The paper's setting for Flickr30K and COCO: 30 epochs, global batch 128, hinge, BERT-base.

    part: "pretrain", "finetune", or "align", the baseline without decoder and teacher.
    """
    image = presets.vit_b16() if tower == "vitb16" else presets.swin_b(size)
    finetune = part == "finetune"
    return TrainConfig(
        stage="pretrain" if part == "pretrain" else "finetune",
        model=ModelConfig(
            image_encoder=image,
            text_encoder=presets.bert_base(),
            image_size=size,
            decoder=DecoderConfig() if finetune else None,
        ),
        data=DataConfig(image_size=size, loader_workers=8),
        loss=LossConfig(distill_weight=1.0 if finetune else 0.0),
    )


def compat(config: TrainConfig) -> TrainConfig:
    """`config` with every departure of the authors' release that has a switch turned on."""
    decoder = config.model.decoder
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model,
            decoder=decoder and dataclasses.replace(decoder, layout="postfix"),
            compat_decoder_padding=True,
            compat_unit_prompt=True,
            compat_batch_norm=True,
        ),
        loss=dataclasses.replace(config.loss, teacher="online", teacher_train_mode=True)
        if config.loss.distill_weight
        else config.loss,
    )


def small(
    part: str,
    *,
    size: int,
    image: TowerConfig,
    text: TowerConfig,
    steps: int,
    width: int,
    max_words_dense: int,
    word_augment: float = 0.2,
    dropout: float | None = None,
    crop_min: float = 0.6,
    flip: float = 0.5,
    lr: float = 1e-3,
    distill_weight: float = 64.0,
) -> TrainConfig:
    """A small image tower from random weights, aligned by InfoNCE at a batch of 128; fit for two CPU cores."""
    finetune = part == "finetune"
    rates = {} if dropout is None else {"text_dropout": dropout, "token_dropout": dropout}
    return TrainConfig(
        stage="pretrain" if part == "pretrain" else "finetune",
        max_steps=steps,
        model=ModelConfig(
            image_encoder=image,
            text_encoder=text,
            width=width,
            image_size=size,
            decoder=DecoderConfig(tokens=16, depth=2) if finetune else None,
            **rates,
        ),
        data=DataConfig(
            image_size=size,
            sparse="one",
            word_augment=word_augment,
            max_words_dense=max_words_dense,
            crop_min=crop_min,
            flip=flip,
            loader_workers=1,
        ),
        loss=LossConfig(align="infonce", distill_weight=distill_weight if finetune else 0.0),
        # The loss is a sum stated at 128 pairs: this clips at a norm of 2 for the mean.
        optim=OptimConfig(lr=lr, backbone_lr=lr, schedule="cosine", warmup_steps=50, grad_clip=256.0),
        engine=EngineConfig(precision="fp32", zero_stage=0),
        log=LogConfig(every=20, evaluate_epochs=5),
    )


def flickr8k_small(part: str, *, steps: int) -> TrainConfig:
    """Flickr8k photographs at 112 pixels; the text tower is a frozen MiniLM under trained heads.

    Words are not masked and nothing is dropped: MiniLM never met [MASK], and a short run has no time to overfit.
    """
    return small(
        part,
        size=112,
        image=presets.small_resnet(),
        text=presets.minilm(),
        steps=steps,
        width=256,
        max_words_dense=112,
        word_augment=0.0,
        dropout=0.0,
    )


def scenes_small(part: str, *, steps: int) -> TrainConfig:
    """Procedural scenes at 64 pixels; both towers from random weights.

    Their captions name sides and corners, which a flip or a narrow crop would make false.
    """
    return small(
        part,
        size=64,
        image=presets.small_resnet((32, 64, 128)),
        text=presets.small_bert(),
        steps=steps,
        width=128,
        max_words_dense=128,
        crop_min=0.9,
        flip=0.0,
    )


def _all() -> dict[str, Callable[[], TrainConfig]]:
    recipes: dict[str, Callable[[], TrainConfig]] = {}
    for data in ("f30k", "coco"):
        for tower, sizes in PAPER_SIZES.items():
            for size in sizes:
                for part in ("pretrain", "finetune", "align"):
                    build = partial(paper, part, tower, size)
                    recipes[f"{data}_{tower}_{size}_{part}"] = build
                    if part != "align":
                        recipes[f"{data}_{tower}_{size}_{part}_compat"] = partial(_compat_of, build)
    recipes |= {
        "flickr8k_small_pretrain": partial(flickr8k_small, "pretrain", steps=200),
        "flickr8k_small_finetune": partial(flickr8k_small, "finetune", steps=900),
        "flickr8k_small_align": partial(flickr8k_small, "align", steps=1100),
        "scenes_small_pretrain": partial(scenes_small, "pretrain", steps=200),
        "scenes_small_finetune": partial(scenes_small, "finetune", steps=100),
        "scenes_small_align": partial(scenes_small, "align", steps=300),
    }
    return recipes


def _compat_of(build: Callable[[], TrainConfig]) -> TrainConfig:
    return compat(build())


RECIPES = _all()
"""Every recipe by name: a function of no arguments."""
