"""Describes a training for `train.py --dry-run`: configuration, parameters, training steps, estimated memory."""

import dataclasses
import json
import os
import warnings

import torch

from d2s.data.batch import BatchBuilder
from d2s.data.batches import TrainBatches
from d2s.model.config import IdleSetting, idle_settings
from d2s.plan.memory import memory
from d2s.plan.sizes import Sizes, by_shape, count, saved_bytes
from d2s.preprocess.text import TextPipeline
from d2s.training.build import build_model, build_module
from d2s.training.engine import bucket_size, checkpoint_activations
from d2s.training.module import TrainingModule
from d2s.training.run_spec import RunSpec

_GIB = 2**30
_PAIRS = 2


def describe(spec: RunSpec) -> str:
    """Returns the text to print. Builds the model on the CPU and runs a forward pass on two pairs of the data set.

    The paper's towers get their real shapes, but random weights. BERT's vocabulary is then built from the captions.
    """
    resolved = json.dumps(spec.config.to_dict(), indent=2)
    # Warns about the user's own configuration, before `by_shape` replaces its towers.
    for line in idle_settings(spec.config.model, {"decoder"} if spec.init else None):
        warnings.warn(line, IdleSetting, stacklevel=2)
    spec = dataclasses.replace(spec, config=by_shape(spec.config))
    config = spec.config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IdleSetting)
        model = build_model(spec)
    if config.engine.activation_checkpointing:
        checkpoint_activations(model)
    module = build_module(spec, model)
    parts = memory_parts(spec, module)
    pairs = spec.captions != "dense" and config.data.sparse == "all"
    unit = "visits of a stream" if spec.streams else "image-caption pairs" if pairs else "images"
    batch = f"{config.batch_size} on {spec.world} workers, {spec.local_batch} each"
    if 0 < config.engine.micro_batch < spec.local_batch:
        batch += f", embedded {config.engine.micro_batch} at a time"
    lines = [
        resolved,
        "",
        *_parameters(module),
        "",
        f"an epoch         {spec.items:,} {unit}",
        f"steps            {spec.steps_per_epoch:,} an epoch, {spec.total_steps:,} in all",
        f"batch            {batch}",
        "",
        f"memory a worker  {sum(parts.values()) / _GIB:.2f} GiB, estimated (the allocator's slack not counted)",
        *(f"  {name:<15}{size / _GIB:.3f} GiB" for name, size in parts.items()),
    ]
    return "\n".join(lines)


def _parameters(module: TrainingModule) -> list[str]:
    """Returns the lines of the parameter table. A parameter that several parts share counts in the first part."""
    model = module.model
    parts = {
        "image tower": model.image_encoder.tower,
        "image head": model.image_encoder,
        "text tower": model.text_encoder.tower,
        "text head": model.text_encoder,
        "decoder": model.decoder,
        "objective": module.objective,
    }
    lines, counted = [f"{'parameters':<17}{'all':>13}{'learned':>13}"], set()
    for name, part in parts.items():
        if part is None:
            continue
        new = [p for p in part.parameters() if id(p) not in counted]
        counted |= {id(p) for p in new}
        total, learned = sum(p.numel() for p in new), sum(p.numel() for p in new if p.requires_grad)
        lines.append(f"  {name:<15}{total:>13,}{learned:>13,}")
    return lines


def memory_parts(spec: RunSpec, module: TrainingModule) -> dict[str, int]:
    """Maps each part of the memory to its bytes on one worker. Measures activations on pairs of the data set."""
    config = spec.config
    sizes = Sizes(**count(module, config), saved=0, saved_per_pair=_saved_per_pair(spec, module))
    bucket = bucket_size(spec.engine_settings())
    return memory(config, sizes, spec.world, config.engine.zero_stage, config.batch_size, bucket)


def _saved_per_pair(spec: RunSpec, module: TrainingModule) -> int:
    split = "val" if spec.streams else "train"
    pairs = min(_PAIRS, len(spec.index.rows(split)))
    data = spec.config.data
    builder = BatchBuilder(
        dataclasses.replace(data, loader_workers=0),
        TextPipeline(module.model.tokenizer, data.max_words_dense),
        captions="dense" if spec.captions == "dense" else "sparse",
        seed=spec.config.seed,
    )
    batches = TrainBatches(spec.index, split, builder, batch_size=pairs)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0))))
    return saved_bytes(module, next(batches.epoch(0))) // pairs
