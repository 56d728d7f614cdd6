"""Settings of the small recipes, which can be trained on two CPU cores."""

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
    """Returns a configuration with a small image tower, trained from random weights with InfoNCE at a batch of 128.
    The hinge loss of the paper would not learn from random weights, because all similarities are about equal.
    steps: number of training steps. size: side of the input image in pixels. image, text: the towers. model, data:
    other fields of ModelConfig and DataConfig."""
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
        # The loss is a sum over 128 pairs. Clipping its gradient at 256 is like clipping a mean's gradient at 2.
        optim=OptimConfig(lr=1e-3, backbone_lr=1e-3, schedule="cosine", warmup_steps=50, grad_clip=256.0),
        engine=EngineConfig(precision="fp32", zero_stage=0),
        validation=ValidationConfig(every_epochs=5),
        log=LogConfig(every=20),
    )
