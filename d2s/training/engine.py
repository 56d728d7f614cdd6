"""The DeepSpeed engine: its settings derived from ours, and its start."""

import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from d2s.checkpoint.zero_state import ZeroState
from d2s.model.config import IdleSetting
from d2s.workers.group import waiting_time

if TYPE_CHECKING:
    from d2s.model import D2SModel

# What a DeepSpeed JSON may not set, and what does: the trainer counts on it, or a checkpoint could not keep it.
_OURS = {
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
}
BUCKET = 500_000_000
"""Numbers in the bucket in which ZeRO sends gradients, where a DeepSpeed JSON sets no reduce_bucket_size."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the state of training is held and in which precision it computes."""

    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: forward and backward under autocast; weights, gradients, losses and optimizer stay in fp32."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """ZeRO stage: what is divided among workers (1 the optimizer's state, 2 gradients too, 3 weights too)."""
    offload_optimizer: bool = False
    """Keep AdamW's state in the host's memory and step it there; needs ZeRO, and matters on a GPU only."""
    activation_checkpointing: bool = False
    """The towers keep each layer's input only, and compute what is inside again for the backward pass."""
    micro_batch: int = 0
    """Pairs that a worker embeds at a time; their gradients add up to that of the whole batch.
    0 embeds all pairs of the worker at once."""
    deepspeed_json: str = ""
    """Path of a DeepSpeed JSON merged on top of the derived settings."""

    def __post_init__(self) -> None:
        if self.offload_optimizer and not self.zero_stage:
            raise ValueError(
                "engine.offload_optimizer is on with engine.zero_stage 0, which has nothing to put elsewhere: set "
                "engine.zero_stage to 1, 2 or 3"
            )
        if self.micro_batch < 0:
            raise ValueError(
                f"engine.micro_batch is {self.micro_batch}: it must be 0 (all pairs at once) or more"
            )


def engine_settings(config: EngineConfig, local_batch: int, grad_clip: float) -> dict[str, Any]:
    """DeepSpeed's settings for `local_batch` pairs a worker, the user's JSON merged on top.

    Raises ValueError where that file is missing, is not a JSON object, or sets what our own fields do.
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
        # DeepSpeed's own AdamW for the CPU is compiled at its first use; torch's steps a little slower, and alike.
        settings["zero_force_ds_cpu_optimizer"] = False
    return _merge(settings, _users_json(config.deepspeed_json)) if config.deepspeed_json else settings


def bucket_size(settings: dict[str, Any]) -> int:
    """Numbers in DeepSpeed's communication bucket under these settings."""
    return int(settings["zero_optimization"].get("reduce_bucket_size", BUCKET))


def _users_json(path: str) -> dict[str, Any]:
    where = f"engine.deepspeed_json {path}"
    try:
        extra = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # broken JSON and broken UTF-8 are both a ValueError
        raise ValueError(f"{where}: {error}: give a file that holds a JSON object") from error
    if not isinstance(extra, dict):
        raise ValueError(f"{where}: not a JSON object")
    for name, remedy in _OURS.items():
        if name in extra:
            raise ValueError(
                f"{where} sets {name} to {json.dumps(extra[name])[:60]}: {remedy} instead, and leave it out"
            )
    zero = extra.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ValueError(
            f"{where}: zero_optimization is {json.dumps(zero)[:60]}, not an object: set engine.zero_stage for the "
            "stage, and leave it out"
        )
    if "stage" in zero:
        raise ValueError(
            f"{where} sets zero_optimization.stage to {json.dumps(zero['stage'])[:60]}: set engine.zero_stage "
            "instead, and leave it out"
        )
    bucket = zero.get("reduce_bucket_size", BUCKET)
    if not isinstance(bucket, int | float) or isinstance(bucket, bool) or not 1 <= bucket < float("inf"):
        raise ValueError(
            f"{where}: zero_optimization.reduce_bucket_size is {json.dumps(bucket)[:60]}: give a number of 1 or more"
        )
    return extra


def idle_engine_settings(config: EngineConfig) -> list[str]:
    """A line for each setting that does nothing on this machine."""
    if config.offload_optimizer and not torch.cuda.is_available():
        return ["engine.offload_optimizer has no effect without a GPU: everything is in the host's memory"]
    return []


def checkpoint_activations(model: "D2SModel") -> None:
    """Lets each tower that learns keep its layers' inputs only. Dropout draws the same again.

    Warns (IdleSetting) of a tower for which that has no effect.
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
            # transformers has renamed it; the settings come first under both names.
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
    """The engine around `module`; every worker calls it together.

    Raises ValueError where the settings make it hold its state in a way that no checkpoint can keep.
    """
    import logging

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or it warns that it looked for others in vain
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import groups

    # Compiling the shared-memory collective takes half a minute, and a killed compile leaves a lock that hangs
    # every later run; gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Its calls of torch's older names would fill the screen under ZeRO 3.
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
    if groups._WORLD_GROUP is None and dist.is_initialized():
        # Its own would wait as long as the backend does by default, 10 minutes with NCCL.
        groups._WORLD_GROUP = dist.new_group(timeout=waiting_time())
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        model_parameters=[p for p in module.parameters() if p.requires_grad],
        config=settings,
    )
    ZeroState(engine)  # refuses here, not at the first checkpoint, after an epoch
    return engine
