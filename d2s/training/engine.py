"""The DeepSpeed engine: its settings, derived from the run's configuration, and its start."""

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

# What a DeepSpeed JSON may not set, and what to do instead. The trainer or the checkpoints rely on these settings.
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
"""Default of DeepSpeed's reduce_bucket_size: gradient elements that ZeRO sends at a time."""


@settings("engine")
class EngineConfig(Settings):
    """Precision, and how DeepSpeed divides and holds the training state."""

    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: forward and backward under autocast; weights, gradients, losses and optimizer stay in fp32."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """ZeRO stage: what is divided among workers (1 the optimizer's state, 2 gradients too, 3 weights too)."""
    offload_optimizer: bool = False
    """Keep AdamW's state in the host's memory and step it there; needs ZeRO, and matters on a GPU only."""
    activation_checkpointing: bool = False
    """The towers keep only each layer's input and recompute the rest in the backward pass."""
    micro_batch: NonNegativeInt = 0
    """Pairs that a worker embeds at a time; their gradients add up to that of the whole batch.
    0 embeds all pairs of the worker at once."""
    deepspeed_json: str = ""
    """Path of a DeepSpeed JSON merged on top of the derived settings."""

    def __post_init__(self) -> None:
        if self.offload_optimizer and not self.zero_stage:
            raise ValueError(
                "engine.offload_optimizer is on with engine.zero_stage 0, which has nothing to offload: set "
                "engine.zero_stage to 1, 2 or 3"
            )


def engine_settings(config: EngineConfig, local_batch: int, grad_clip: float) -> dict[str, Any]:
    """DeepSpeed's settings for `local_batch` pairs a worker, the user's JSON merged on top.

    Raises ValueError where that file is missing, is no JSON object, or sets something that a field of ours sets.
    """
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
        # DeepSpeed's AdamW for the CPU has to be compiled; torch's is a little slower and gives the same result.
        settings["zero_force_ds_cpu_optimizer"] = False
    return _merge(settings, _users_json(config.deepspeed_json)) if config.deepspeed_json else settings


def bucket_size(settings: dict[str, Any]) -> int:
    """Elements in DeepSpeed's communication bucket under these settings."""
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
    """One line for each setting that has no effect on this machine."""
    if config.offload_optimizer and not torch.cuda.is_available():
        return ["engine.offload_optimizer has no effect without a GPU: everything is in the host's memory"]
    return []


def checkpoint_activations(model: "D2SModel") -> None:
    """Makes each trained tower keep only its layers' inputs; recomputing them repeats the same dropout.

    Warns (IdleSetting) about a tower for which that has no effect.
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
            # transformers renamed the method; the settings are the first argument of both.
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
    """Starts the engine around `module`, on all workers together.

    Raises ValueError where the settings give the training state a form that no checkpoint can hold.
    """
    import logging

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # avoids a warning about missing accelerators
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import groups

    # Compiling the shared-memory collective takes half a minute, and a killed compiler leaves a lock that blocks
    # every later run; gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed uses deprecated names of torch, which would fill the screen under ZeRO 3.
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
    if groups._WORLD_GROUP is None and dist.is_initialized():
        # DeepSpeed's own group would time out after the backend's default, 10 minutes with NCCL.
        groups._WORLD_GROUP = dist.new_group(timeout=waiting_time())
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        model_parameters=[p for p in module.parameters() if p.requires_grad],
        config=settings,
    )
    ZeroState(engine)  # raises here rather than at the first checkpoint, an epoch later
    return engine
