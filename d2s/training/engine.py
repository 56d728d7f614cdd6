"""Derives DeepSpeed's settings from the run's configuration, and starts the DeepSpeed engine."""

import json
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from pydantic import NonNegativeInt
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from d2s.checkpoint.zero_state import ZeroState
from d2s.common.settings import Settings, settings
from d2s.model.config import IdleSetting
from d2s.workers.group import waiting_time

if TYPE_CHECKING:
    from d2s.model import D2SModel

# Maps settings that a user's DeepSpeed JSON must not contain to the remedy. Our code relies on their values.
_RESERVED = {
    "train_batch_size": "set batch_size",
    "train_micro_batch_size_per_gpu": "set batch_size",
    "gradient_accumulation_steps": "set engine.micro_batch",
    "gradient_clipping": "set optim.grad_clip",
    "optimizer": "set the fields of optim",
    "scheduler": "set the fields of optim",
    "fp16": "set engine.precision",
    "bf16": "set engine.precision",
    "bfloat16": "set engine.precision",
    "amp": "set engine.precision",
    "torch_autocast": "set engine.precision",
    "zero_optimization.stage": "set engine.zero_stage",
}
BUCKET = 500_000_000
"""Default value of DeepSpeed's setting reduce_bucket_size: how many gradient elements ZeRO sends at a time."""


@settings("engine")
class EngineConfig(Settings):
    """Precision, and how DeepSpeed stores the training state."""

    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: run the model under bf16 autocast; weights, gradients, losses and optimizer stay in fp32."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """ZeRO stage. 1 divides the optimizer's state among workers, 2 also the gradients, 3 also the weights."""
    offload_optimizer: bool = False
    """Keep AdamW's state in CPU memory, and run AdamW on the CPU. Needs ZeRO. Has no effect without a GPU."""
    activation_checkpointing: bool = False
    """Save memory: keep only the inputs of the towers' layers, and recompute the layers in the backward pass."""
    micro_batch: NonNegativeInt = 0
    """How many pairs a worker embeds at a time; 0 for all of its pairs. It does not change the gradient."""
    deepspeed_json: str = ""
    """Path of a JSON file with DeepSpeed settings. They are merged into the derived settings, and take precedence."""

    def __post_init__(self) -> None:
        if self.offload_optimizer and not self.zero_stage:
            raise ValueError(
                "engine.offload_optimizer is on with engine.zero_stage 0, which has nothing to offload: set "
                "engine.zero_stage to 1, 2 or 3"
            )


def engine_settings(config: EngineConfig, local_batch: int, grad_clip: float) -> dict[str, Any]:
    """Returns DeepSpeed's settings, with the settings of the user's JSON file (`config.deepspeed_json`) merged in.
    local_batch: pairs of each worker. grad_clip: maximum norm of the gradient; 0 for no clipping. Raises ValueError
    if the file is missing, is not a JSON object, or contains a setting that it must not contain."""
    settings = {
        "train_micro_batch_size_per_gpu": local_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": grad_clip,
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if config.offload_optimizer and torch.cuda.is_available():
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        # DeepSpeed's AdamW for the CPU must be compiled; torch's AdamW is a little slower, with the same result.
        settings["zero_force_ds_cpu_optimizer"] = False
    return _merge(settings, _users_json(config.deepspeed_json)) if config.deepspeed_json else settings


def bucket_size(settings: dict[str, Any]) -> int:
    """Returns how many gradient elements ZeRO sends at a time. settings: the result of :func:`engine_settings`."""
    return int(settings["zero_optimization"].get("reduce_bucket_size", BUCKET))


def _users_json(path: str) -> dict[str, Any]:
    where = f"engine.deepspeed_json {path}"
    try:
        extra = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # broken JSON and broken UTF-8 are both a ValueError
        raise ValueError(f"{where}: {error}: give a file that holds a JSON object") from error
    if not isinstance(extra, dict):
        raise ValueError(f"{where}: not a JSON object")
    zero = extra.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ValueError(
            f"{where}: zero_optimization is {json.dumps(zero)[:60]}, not an object: set engine.zero_stage for the "
            "stage, and leave it out"
        )
    names = {**extra, **{f"zero_optimization.{name}": value for name, value in zero.items()}}
    for name, remedy in _RESERVED.items():
        if name in names:
            value = json.dumps(names[name])[:60]
            raise ValueError(f"{where} sets {name} to {value}: {remedy} instead, and leave it out")
    bucket = zero.get("reduce_bucket_size", BUCKET)
    if not isinstance(bucket, int | float) or isinstance(bucket, bool) or not 1 <= bucket < float("inf"):
        raise ValueError(
            f"{where}: zero_optimization.reduce_bucket_size is {json.dumps(bucket)[:60]}: give a number of 1 or more"
        )
    return extra


def idle_engine_settings(config: EngineConfig) -> list[str]:
    """Returns a message for each setting that has no effect on this machine."""
    if config.offload_optimizer and not torch.cuda.is_available():
        return ["engine.offload_optimizer has no effect without a GPU: everything is in the host's memory"]
    return []


def checkpoint_activations(model: "D2SModel") -> None:
    """Switches activation checkpointing on in both towers. Recomputed layers repeat the same dropout.

    Warns (IdleSetting) about a tower for which activation checkpointing has no effect.
    """
    for name in ("image_encoder", "text_encoder"):
        encoder = getattr(model, name)
        tower, reason = encoder.tower, ""
        if encoder.frozen:
            reason = "it is frozen and keeps nothing"
        elif not tower.supports_gradient_checkpointing:
            reason = "transformers cannot compute such a tower's layers again"
        elif any(isinstance(child, _BatchNorm) for child in tower.modules()):
            reason = "its BatchNorm would count every batch twice"
        if reason:
            line = f"engine.activation_checkpointing has no effect on {name}: {reason}"
            warnings.warn(line, IdleSetting, stacklevel=2)
        else:
            # transformers renamed the method. The settings are its first argument under both names.
            older = tower.gradient_checkpointing_enable
            getattr(tower, "activation_checkpointing_enable", older)({"use_reentrant": False})


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            value = _merge(base[key], value)
        merged[key] = value
    return merged


def start_engine(module: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
    """Starts the DeepSpeed engine around `module`, and returns the engine. All workers call this together.

    settings: from :func:`engine_settings`. Raises ValueError if with these settings a checkpoint could not be saved.
    """
    import logging

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # avoids a warning about missing accelerators
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import groups

    # Do not compile DeepSpeed's shared-memory collective. It takes half a minute, and a killed compiler leaves a lock
    # that blocks every later run. gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed uses deprecated names of torch. Under ZeRO 3 the warnings would fill the screen.
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
    if groups._WORLD_GROUP is None and dist.is_initialized():
        # A group that DeepSpeed creates would have the backend's default timeout, 10 minutes with NCCL.
        groups._WORLD_GROUP = dist.new_group(timeout=waiting_time())
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        model_parameters=[p for p in module.parameters() if p.requires_grad],
        config=settings,
    )
    ZeroState(engine)  # raises the ValueError now, and not an epoch later at the first checkpoint
    return engine
