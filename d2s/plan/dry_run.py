"""What `--dry-run` prints: the resolved configuration, parameters by part, steps, an estimate of memory."""

import dataclasses
import json
import os
import warnings

import torch

from d2s.data.batches import TrainBatches
from d2s.model.config import IdleSetting, idle_settings
from d2s.plan.estimate import Sizes, by_shape, count, kept_bytes, memory
from d2s.preprocess.text import TextPipeline
from d2s.training.build import build_model, build_module
from d2s.training.engine import bucket_size, checkpoint_activations
from d2s.training.module import TrainingModule
from d2s.training.run_spec import RunSpec

GIB = 1024**3
_PROBE = 2


def describe(plan: RunSpec) -> str:
    """The whole text. Builds the model on the CPU and sends a few real pairs through it.

    The paper's towers are built by their shape with random weights, BERT's vocabulary being that of the captions.
    """
    resolved = json.dumps(plan.config.to_dict(), indent=2)
    # Said of the towers that were asked for: those built by their shape have random weights in any case.
    for line in idle_settings(plan.config.model, {"decoder"} if plan.init else None):
        warnings.warn(line, IdleSetting, stacklevel=2)
    plan = dataclasses.replace(plan, config=by_shape(plan.config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IdleSetting)
        model = build_model(plan)
    if plan.config.engine.activation_checkpointing:
        checkpoint_activations(model)
    module = build_module(plan, model)
    parts = memory_parts(plan, module)
    lines = [resolved, "", _parameters(module), ""]
    pairs = plan.captions != "dense" and plan.config.data.sparse == "all"
    unit = "visits of a stream" if plan.streams else "image-caption pairs" if pairs else "images"
    lines.append(f"an epoch         {plan.items:,} {unit}")
    lines.append(f"steps            {plan.steps_per_epoch:,} an epoch, {plan.total_steps:,} in all")
    lines.append(
        f"batch            {plan.config.batch_size} on {plan.world} workers, {plan.local_batch} each"
    )
    if 0 < plan.config.engine.micro_batch < plan.local_batch:
        lines[-1] += f", embedded {plan.config.engine.micro_batch} at a time"
    lines.append("")
    lines.append(
        f"memory a worker  {sum(parts.values()) / GIB:.2f} GiB, estimated (the allocator's slack not counted)"
    )
    lines += [f"  {name:<15}{size / GIB:.3f} GiB" for name, size in parts.items()]
    return "\n".join(lines)


def _parameters(module: TrainingModule) -> str:
    model = module.model
    parts = {
        "image tower": model.image_encoder.tower,
        "image head": model.image_encoder,
        "text tower": model.text_encoder.tower,
        "text head": model.text_encoder,
        "decoder": model.decoder,
        "objective": module.objective,
    }
    lines, seen = [f"{'parameters':<17}{'all':>13}{'learned':>13}"], set()
    for name, part in parts.items():
        if part is None:
            continue
        fresh = [p for p in part.parameters() if id(p) not in seen]
        seen |= {id(p) for p in fresh}
        every, learned = sum(p.numel() for p in fresh), sum(p.numel() for p in fresh if p.requires_grad)
        lines.append(f"  {name:<15}{every:>13,}{learned:>13,}")
    return "\n".join(lines)


def memory_parts(plan: RunSpec, module: TrainingModule) -> dict[str, int]:
    """Bytes on one worker by part, as d2s.plan counts them, with the activations of a few real pairs."""
    config = plan.config
    every, learned, teacher = count(module, config)
    per_pair = _kept_per_pair(plan, module)
    sizes = Sizes(every=every, learned=learned, teacher=teacher, kept=0, kept_per_pair=per_pair)
    bucket = bucket_size(plan.engine_settings())
    return memory(config, sizes, plan.world, config.engine.zero_stage, config.batch_size, bucket)


def _kept_per_pair(plan: RunSpec, module: TrainingModule) -> int:
    split = "val" if plan.streams else "train"
    probe = min(_PROBE, len(plan.index.rows(split)))
    config = plan.config.data
    batches = TrainBatches(
        plan.index,
        split,
        type(config)(**{**vars(config), "loader_workers": 0}),
        TextPipeline(module.model.tokenizer, config.max_words_dense),
        captions="dense" if plan.captions == "dense" else "sparse",
        batch_size=probe,
        seed=plan.config.seed,
    )
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0))))
    return kept_bytes(module, next(batches.epoch(0))) // probe
