"""What `--dry-run` prints: the resolved configuration, parameters by part, steps, an estimate of memory."""

import dataclasses
import json
import os
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from d2s.config import TrainConfig, to_dict
from d2s.data import TrainBatches
from d2s.model.config import IdleSetting, idle_settings
from d2s.model.presets import shape_of
from d2s.prepare import Plan
from d2s.text import TextPipeline
from d2s.training_module import TrainingModule

GIB = 1024**3
_PROBE = 2


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one worker."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def describe(plan: Plan) -> str:
    """The whole text. Builds the model on the CPU and sends a few real pairs through it.

    The paper's towers are built by their shape with random weights, BERT's vocabulary being that of the captions.
    """
    resolved = json.dumps(to_dict(plan.config), indent=2)
    # Said of the towers that were asked for: those built by their shape have random weights in any case.
    for line in idle_settings(plan.config.model, {"decoder"} if plan.init else None):
        warnings.warn(line, IdleSetting, stacklevel=2)
    plan = dataclasses.replace(plan, config=_by_shape(plan.config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IdleSetting)
        model = plan.build_model()
    module = plan.build_module(model)
    memory = estimate_memory(plan, module, activation_bytes(plan, module))
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
        f"memory a worker  {memory.total / GIB:.2f} GiB, estimated (the allocator's slack not counted)"
    )
    for name in ("weights", "gradients", "optimizer", "activations"):
        lines.append(f"  {name:<15}{getattr(memory, name) / GIB:.3f} GiB")
    return "\n".join(lines)


def _by_shape(config: TrainConfig) -> TrainConfig:
    """The configuration with the paper's towers by their shape: a dry run needs no weights and so no hub."""
    model = config.model
    towers = {name: shape_of(getattr(model, name)) for name in ("image_encoder", "text_encoder")}
    return dataclasses.replace(config, model=dataclasses.replace(model, **towers))


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


def estimate_memory(plan: Plan, module: torch.nn.Module, activations: int) -> Memory:
    """Weights and gradients in fp32, AdamW's two moments, what ZeRO divides divided, and the activations."""
    stage, world = plan.config.engine.zero_stage, plan.world
    every = 4 * sum(p.numel() for p in module.parameters())
    learned = 4 * sum(p.numel() for p in module.parameters() if p.requires_grad)
    # ZeRO 1 and 2 keep an fp32 copy of the weights beside the module's own in the flat optimizer state.
    copies = 3 if stage else 2
    return Memory(
        weights=every,
        gradients=learned // (world if stage >= 2 else 1),
        optimizer=copies * learned // (world if stage >= 1 else 1),
        activations=activations,
    )


def activation_bytes(plan: Plan, module: TrainingModule) -> int:
    """What a worker's forward pass keeps for the backward, scaled up from a probe of a few real pairs.

    Counts the storages that autograd saves, each once, the parameters left out. By micro-batches a worker keeps that
    of one of them, and the embeddings of all its pairs with their gradients.
    """
    local, kept = plan.local_batch, 0
    if 0 < plan.config.engine.micro_batch < local:
        kept = 2 * 2 * 4 * plan.config.model.width * local  # image and text, value and gradient, in fp32
        local = plan.config.engine.micro_batch
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
    batch = next(batches.epoch(0))
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    teacher = torch.zeros(probe, plan.config.model.width) if plan.config.loss.distill_weight else None
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0))))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # The graph is kept until the count is taken, or a freed storage's address would be counted again.
        losses = module(batch, 1.0, teacher)
    del losses
    return kept + sum(saved.values()) * local // probe
