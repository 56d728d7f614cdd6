"""Builds configurations with the paper's settings for Flickr30K and COCO."""

import dataclasses
from typing import Literal

from d2s.data.config import DataConfig
from d2s.losses.config import LossConfig
from d2s.model import DecoderConfig, ModelConfig, presets
from d2s.training.config import TrainConfig

Tower = Literal["vitb16", "swinb"]
Stage = Literal["pretrain", "finetune", "align"]


def paper(tower: Tower, size: int, stage: Stage) -> TrainConfig:
    """Returns the paper's configuration: 30 epochs, batch 128, hinge loss with margin 0.2, BERT-base. It is the same
    for both data sets.
    tower: the image tower. size: side of the input image in pixels. stage: "align" is the baseline without decoder
    and teacher."""
    finetune = stage == "finetune"
    return TrainConfig(
        stage="pretrain" if stage == "pretrain" else "finetune",
        model=ModelConfig(
            image_encoder=presets.VIT_B16 if tower == "vitb16" else presets.swin_b(size),
            text_encoder=presets.BERT_BASE,
            image_size=size,
            decoder=DecoderConfig() if finetune else None,
        ),
        data=DataConfig(image_size=size, loader_workers=8),
        loss=LossConfig(margin=0.2, distill_weight=1.0 if finetune else 0.0),
    )


def compat(tower: Tower, size: int, stage: Stage) -> TrainConfig:
    """Returns the configuration of `paper`, but follows the authors' released code wherever it differs."""
    config = paper(tower, size, stage)
    decoder, loss = config.model.decoder, config.loss
    if decoder:
        decoder = dataclasses.replace(decoder, layout="postfix")
    if loss.distill_weight:
        loss = dataclasses.replace(loss, teacher="online", teacher_train_mode=True)
    model = dataclasses.replace(
        config.model,
        decoder=decoder,
        compat_decoder_padding=True,
        compat_unit_prompt=True,
        compat_batch_norm=True,
    )
    return dataclasses.replace(config, model=model, loss=loss)
