"""Counts on the CPU how many parameters a recipe's model has, and how many bytes of activations a pair needs.

The model is built with random weights. Activations are measured in forward passes of two pairs and of four pairs.
The pairs are random, and their captions have the greatest length. Neither a GPU nor data is needed.
"""

import dataclasses
import warnings
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from d2s.data.batch import Batch
from d2s.losses.objective import Objective
from d2s.model import D2SModel, build_word_tokenizer
from d2s.model.config import IdleSetting
from d2s.model.presets import shape_of
from d2s.model.tokenizer import WORDS
from d2s.plan.activations import SavedActivations
from d2s.training.config import TrainConfig
from d2s.training.engine import checkpoint_activations
from d2s.training.gradient_cache import check_norms, trained_batch_norms
from d2s.training.module import TrainingModule


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of a recipe's model."""

    parameters: int
    """Number of parameters of the model, including frozen parameters."""
    learned: int
    """Number of parameters that are trained."""
    teacher: int
    """Number of parameters of the online teacher, a frozen copy of the text encoder, or 0 if there is none."""
    saved: int
    """Bytes that a forward pass saves for the backward pass whatever the batch size is."""
    saved_per_pair: int
    """Bytes that a forward pass saves for each pair of the batch, in addition to `saved`."""
    batch_norm: bool = False
    """Whether the model has a BatchNorm that is trained. If so, training raises an error for micro-batches."""


def by_shape(config: TrainConfig) -> TrainConfig:
    """Returns `config` with only the shapes of the paper's towers, so that no weights are downloaded."""
    model = config.model
    towers = {name: shape_of(getattr(model, name)) for name in ("image_encoder", "text_encoder")}
    return dataclasses.replace(config, model=dataclasses.replace(model, **towers))


def measure_sizes(config: TrainConfig, words: int, local_batch: int) -> Sizes:
    """Builds the model of `config` and measures its sizes.

    Args:
        words: number of tokens in the vocabulary. It is used only if the vocabulary is built from captions.
        local_batch: number of pairs on each worker.

    Raises:
        ValueError: engine.micro_batch is below `local_batch`, and the model has a BatchNorm that is trained.
    """
    module = build(config, words, local_batch)
    two, four = (saved_bytes(module, made_up_batch(config, module, pairs)) for pairs in (2, 4))
    per_pair = (four - two) // 2
    return Sizes(
        **count(module, config),
        saved=max(0, two - 2 * per_pair),
        saved_per_pair=per_pair,
        batch_norm=bool(trained_batch_norms(module.model)),
    )


def build(config: TrainConfig, words: int, local_batch: int) -> TrainingModule:
    """Builds the module that training wraps in an engine. `measure_sizes` lists arguments and errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IdleSetting)
        made_from_captions = config.model.text_encoder.tokenizer == WORDS
        model = D2SModel(config.model, vocabulary(words) if made_from_captions else None)
        check_norms(model, config.engine.micro_batch, local_batch)
        if config.engine.activation_checkpointing:
            checkpoint_activations(model)
    return TrainingModule(model, Objective(config.loss), bf16=config.engine.precision == "bf16")


def vocabulary(words: int) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of `words` tokens, or of the smallest possible number if `words` is less."""
    captions = [" ".join(f"w{number}" for number in range(words))]
    least = len(build_word_tokenizer(captions, max_words=1)) - 1
    return build_word_tokenizer(captions, min_count=1, max_words=max(1, words - least))


def count(module: TrainingModule, config: TrainConfig) -> dict[str, int]:
    """Counts parameters. Returns the fields `parameters`, `learned` and `teacher` of `Sizes`."""
    parameters = sum(p.numel() for p in module.parameters())
    learned = sum(p.numel() for p in module.parameters() if p.requires_grad)
    online = config.loss.distill_weight and config.loss.teacher == "online"
    teacher = sum(p.numel() for p in module.model.text_encoder.parameters()) if online else 0
    return {"parameters": parameters, "learned": learned, "teacher": teacher}


def made_up_batch(config: TrainConfig, module: TrainingModule, pairs: int) -> Batch:
    """Returns a batch of `pairs` random images and captions. The captions have the recipe's greatest length."""
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


def saved_bytes(module: nn.Module, batch: Batch) -> int:
    """Returns how many bytes a forward pass of `batch` saves for the backward pass. Parameters do not count."""
    width = module.model.config.width
    teacher = torch.zeros(len(batch), width) if module.objective.config.distill_weight else None
    module.train()
    with SavedActivations(module) as saved:
        module(batch, 1.0, teacher)
    return saved.most
