"""Settings of the small recipes, which train on two CPU cores."""

from typing import Any

from d2s.data.config import DataConfig
from d2s.losses.config import LossConfig
from d2s.model import DecoderConfig, ModelConfig, TowerConfig
from d2s.training.config import LogConfig, TrainConfig, ValidationConfig
from d2s.training.engine import EngineConfig
from d2s.training.optimizer import OptimConfig
from d2s.training.recipes.paper import Stage


def small(
    stage: Stage,
    *,
    steps: int,
    size: int,
    image: TowerConfig,
    text: TowerConfig,
    model: dict[str, Any],
    data: dict[str, Any],
) -> TrainConfig:
    """A small image tower from random weights, aligned by InfoNCE at a batch of 128.

    From random weights all similarities are alike and the hardest negative is noise, so the hardest-negative hinge
    would stall. size: side of the input image in pixels. model, data: further fields of their settings.
    """
    finetune = stage == "finetune"
    return TrainConfig(
        stage="pretrain" if stage == "pretrain" else "finetune",
        max_steps=steps,
        model=ModelConfig(
            image_encoder=image,
            text_encoder=text,
            image_size=size,
            decoder=DecoderConfig(tokens=16, depth=2) if finetune else None,
            **model,
        ),
        data=DataConfig(image_size=size, sparse="one", loader_workers=1, **data),
        loss=LossConfig(align="infonce", distill_weight=64.0 if finetune else 0.0),
        # The loss is a sum stated at 128 pairs: this clips at a norm of 2 for the mean.
        optim=OptimConfig(lr=1e-3, backbone_lr=1e-3, schedule="cosine", warmup_steps=50, grad_clip=256.0),
        engine=EngineConfig(precision="fp32", zero_stage=0),
        validation=ValidationConfig(every_epochs=5),
        log=LogConfig(every=20),
    )
