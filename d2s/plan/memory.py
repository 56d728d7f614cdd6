"""What a training needs, counted: bytes a worker by part for each ZeRO stage, and bytes sent a step by part.

Weights are counted on the model itself, on the CPU; activations are what sending two and four made-up pairs through
it keeps, captions at their longest. No GPU and no data are needed.
"""

import dataclasses
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from d2s.data.loader import Batch
from d2s.kernels.chunked.common import CHUNK_ENTRIES, MIN_ROWS
from d2s.losses.objective import LossConfig, Objective
from d2s.model import D2SModel, build_word_tokenizer
from d2s.model.config import IdleSetting
from d2s.model.presets import shape_of
from d2s.model.tokenizer import WORDS
from d2s.training.config import TrainConfig
from d2s.training.engine import checkpoint_activations
from d2s.training.gradient_cache import check_norms
from d2s.training.module import TrainingModule

STAGES = (0, 1, 2, 3)
PARTS = ("weights", "gradients", "optimizer", "buckets", "activations", "gathered", "loss")
_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a recipe's model weighs, in numbers and bytes."""

    every: int
    """Parameters, frozen ones included."""
    learned: int
    teacher: int
    """Parameters of the frozen text tower that an online teacher keeps beside the model; 0 without one."""
    kept: int
    """Bytes that a forward pass keeps for the backward, whatever the batch."""
    kept_per_pair: int
    whole: bool = False
    """A BatchNorm needs all pairs of a worker at once: no batch beyond engine.micro_batch, where that is set."""


def by_shape(config: TrainConfig) -> TrainConfig:
    """The configuration with the paper's towers by their shape: an estimate needs no weights and so no hub."""
    model = config.model
    towers = {name: shape_of(getattr(model, name)) for name in ("image_encoder", "text_encoder")}
    return dataclasses.replace(config, model=dataclasses.replace(model, **towers))


def measure_sizes(config: TrainConfig, words: int, local: int) -> Sizes:
    """Counts and probes the model of `config` with random weights where `config` names none that are at hand.

    words: pieces of the vocabulary, where it comes from captions. local: pairs of the batch on a worker.
    Raises ValueError where the model cannot be embedded in the micro-batches of engine.micro_batch.
    """
    module = build(config, words, local)
    small, large = (kept_bytes(module, made_up_batch(config, module, pairs)) for pairs in (2, 4))
    per_pair = (large - small) // 2
    every, learned, teacher = count(module, config)
    return Sizes(
        every=every, learned=learned, teacher=teacher,
        kept=max(0, small - 2 * per_pair), kept_per_pair=per_pair, whole=_whole(module.model),
    )  # fmt: skip


def build(config: TrainConfig, words: int, local: int) -> TrainingModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IdleSetting)
        model = D2SModel(
            config.model, vocabulary(words) if config.model.text_encoder.tokenizer == WORDS else None
        )
        check_norms(model, config.engine.micro_batch, local)
        if config.engine.activation_checkpointing:
            checkpoint_activations(model)
    return TrainingModule(model, Objective(config.loss), bf16=config.engine.precision == "bf16")


def _whole(model: D2SModel) -> bool:
    try:
        check_norms(model, 1, 2)
    except ValueError:
        return True
    return False


def vocabulary(words: int) -> PreTrainedTokenizerFast:
    """A made-up tokenizer of `words` pieces, or of the few more that every tokenizer has."""
    captions = [" ".join(f"w{number}" for number in range(words))]
    least = len(build_word_tokenizer(captions, max_words=1)) - 1
    return build_word_tokenizer(captions, min_count=1, max_words=max(1, words - least))


def count(module: TrainingModule, config: TrainConfig) -> tuple[int, int, int]:
    """Parameters in all, of them learned, and those of an online teacher beside them."""
    every = sum(p.numel() for p in module.parameters())
    learned = sum(p.numel() for p in module.parameters() if p.requires_grad)
    online = config.loss.distill_weight and config.loss.teacher == "online"
    teacher = sum(p.numel() for p in module.model.text_encoder.parameters()) if online else 0
    return every, learned, teacher


def made_up_batch(config: TrainConfig, module: TrainingModule, pairs: int) -> Batch:
    """Random pixels and captions of the greatest length that the recipe lets through."""
    data, model = config.data, module.model
    length = data.max_words_dense if config.stage == "pretrain" else data.max_words_sparse
    length = min(length, model.max_words)
    draw = torch.Generator().manual_seed(0)
    numbers = torch.arange(pairs)
    return Batch(
        images=torch.randint(0, 256, (pairs, 3, data.image_size, data.image_size), dtype=torch.uint8, generator=draw),
        text_ids=torch.randint(5, len(model.tokenizer), (pairs, length), generator=draw),
        text_mask=torch.ones(pairs, length, dtype=torch.bool),
        image_ids=numbers,
        samples=numbers,
        dense_index=numbers,
        draw_seeds=numbers + 1,
    )  # fmt: skip


def kept_bytes(module: nn.Module, batch: Batch) -> int:
    """Storages that autograd saves in a forward pass, each once, the parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    width = module.model.config.width
    teacher = torch.zeros(len(batch), width) if module.objective.config.distill_weight else None
    module.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # The graph lives until the count is taken, or a freed storage's address would be counted again.
        losses = module(batch, 1.0, teacher)
    total = sum(saved.values())
    del losses
    return total


def memory(
    config: TrainConfig, sizes: Sizes, workers: int, stage: int, batch: int, bucket: int
) -> dict[str, int]:
    """Bytes on one worker by part, for a global `batch` on `workers` workers.

    bucket: numbers in DeepSpeed's communication bucket, which it makes as large as it is told, whatever the model.
    """
    divided = workers if stage else 1
    learned, width = _FP32 * sizes.learned, config.model.width
    # ZeRO 3 divides all weights of the model, frozen ones too; an online teacher is none of the engine's.
    model, teacher = _FP32 * sizes.every, _FP32 * sizes.teacher
    local = batch // workers
    pieces = config.engine.micro_batch
    embedded = min(pieces, local) if pieces else local
    cached = 4 * _FP32 * width * local if pieces and pieces < local else 0
    # ZeRO 3 keeps what it gathered from the forward to the backward pass, up to a thousand million numbers.
    gathered_weights = min(model, _FP32 * 10**9) if stage == 3 else 0
    copies = 3 if stage else 2  # ZeRO's flat fp32 copy beside AdamW's two moments
    offloaded = config.engine.offload_optimizer and stage
    columns = batch if config.loss.exchange == "gather" else 2 * local
    # Both sides and their gradients; relational distillation brings captions again, their gradient and the teacher's.
    gathered = 4 + 3 * _relational(config.loss)
    rows = min(local, max(MIN_ROWS, CHUNK_ENTRIES // max(columns, 1)))
    return {
        "weights": teacher + model // (workers if stage == 3 else 1),
        "gradients": learned // (workers if stage >= 2 else 1),
        "optimizer": 0 if offloaded else copies * learned // divided,
        "buckets": (_FP32 * bucket if stage else 0) + gathered_weights,
        "activations": sizes.kept + sizes.kept_per_pair * embedded + cached,
        "gathered": gathered * _FP32 * width * columns if workers > 1 else 0,
        "loss": 3 * _FP32 * rows * columns,
    }


def largest_batch(config: TrainConfig, sizes: Sizes, workers: int, stage: int, room: int, bucket: int) -> int:
    """The largest global batch, a multiple of the number of workers, that takes at most `room` bytes a worker."""

    def fits(local: int) -> bool:
        if sizes.whole and 0 < config.engine.micro_batch < local:
            return False  # training refuses it
        return sum(memory(config, sizes, workers, stage, local * workers, bucket).values()) <= room

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high) and high < 1 << 24:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * workers


def traffic(config: TrainConfig, sizes: Sizes, workers: int, stage: int, batch: int) -> dict[str, int]:
    """Bytes that one worker sends a step by part, for collectives in a ring.

    A gather of M bytes in all costs (W - 1) / W * M, a reduction to all of them twice that.
    """
    share = (workers - 1) / workers
    learned, frozen = _FP32 * sizes.learned, _FP32 * (sizes.every - sizes.learned)
    local = batch // workers
    pieces = config.engine.micro_batch
    passes = -(-local // pieces) if 0 < pieces < local else 1
    # Gradients and weights: ZeRO 1 and 2 reduce gradients to where they belong and gather the stepped weights, as
    # much as one reduction to all; ZeRO 3 gathers weights for each forward and each backward pass. By micro-batches
    # there are two forward passes and a backward one for each; ZeRO 2 and 3, which divide gradients, then reduce
    # them after each.
    gathered = learned if stage in (1, 2) else 0
    if stage == 3:
        forward = 2 * passes if passes > 1 else 1
        gathered = forward * (learned + frozen) + passes * learned
    there, back = _exchanged(config.loss, _FP32 * config.model.width, workers, local)
    return {
        "gradients": int(share * learned * (2 if stage == 0 else passes if stage > 1 else 1)),
        "weights": int(share * gathered),
        "embeddings": there,
        "their gradients": back,
    }


def _relational(loss: LossConfig) -> bool:
    return bool(loss.distill_weight) and loss.distill == "relational"


def _exchanged(loss: LossConfig, row: int, workers: int, local: int) -> tuple[int, int]:
    """Bytes of embeddings that a worker sends in a step, and of their gradients; `row` bytes an embedding.

    The hinge as after its warm-up.
    """
    if workers == 1:
        return 0, 0
    ring, there, back = loss.exchange == "ring", 0, 0
    # What a worker sends of one side, gathered or handed on.
    side = (workers - 1) * local * row
    # In the ring the columns go round again and collect their gradients, which take one more hop, home.
    home = local * row if ring else 0
    if loss.align_weight:
        # Of the sigmoid loss captions alone are columns; gathered are both sides even so.
        columns = 1 if loss.align == "sigmoid" else 2
        there += (columns if ring else 2) * side
        if loss.align == "hinge":
            # One winner a row each way, with its number, whichever exchange brought it.
            back += 2 * (workers - 1) * local * (row + 8) // workers
        else:
            back += columns * (2 * side + home if ring else side)
    if _relational(loss):
        # Captions, and what the teacher says of them, which has no gradient.
        there += 2 * side
        back += 3 * side + home if ring else side
    return there, back
