"""The DeepSpeed engine: its settings derived from ours, and its start."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the state of training is held and in which precision it computes."""

    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: forward and backward under autocast; weights, gradients, losses and optimizer stay in fp32."""
    zero_stage: Literal[0, 1, 2] = 1
    """ZeRO stage: what is divided among workers (1 the optimizer's state, 2 gradients too)."""
    deepspeed_json: str = ""
    """Path of a DeepSpeed JSON merged on top of the derived settings."""


def engine_settings(config: EngineConfig, local_batch: int, grad_clip: float) -> dict[str, Any]:
    """DeepSpeed's settings for `local_batch` pairs a worker, the user's JSON merged on top.

    Raises ValueError where that file is missing or is not a JSON object.
    """
    settings = {
        "train_micro_batch_size_per_gpu": local_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": grad_clip,
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if config.deepspeed_json:
        path = Path(config.deepspeed_json)
        try:
            extra = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"engine.deepspeed_json {path}: {error}") from error
        if not isinstance(extra, dict):
            raise ValueError(f"engine.deepspeed_json {path}: not a JSON object")
        settings = _merge(settings, extra)
    return settings


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            value = _merge(base[key], value)
        merged[key] = value
    return merged


def start_engine(module: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
    """The engine around `module`; every worker calls it together."""
    import logging

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or it warns that it looked for others in vain
    import deepspeed
    import deepspeed.ops

    # Compiling the shared-memory collective takes half a minute, and a killed compile leaves a lock that hangs
    # every later run; gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        model_parameters=[p for p in module.parameters() if p.requires_grad],
        config=settings,
    )
    return engine
