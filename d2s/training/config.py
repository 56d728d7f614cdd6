"""Defines the configuration of a run, and lets the command line override fields.

Each group of settings is defined in the file whose code uses it. A recipe (:mod:`d2s.training.recipes`) is a function
that returns a :class:`TrainConfig`. The command line sets fields by name: `--optim.lr 1e-4 --loss.distill_weight 0`.
"""

import contextlib
import dataclasses
import io
import re
import sys
from dataclasses import field
from typing import Annotated, Any, Literal, Self

import tyro
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from d2s.common.settings import Settings, did_you_mean, settings
from d2s.data.config import DataConfig
from d2s.losses.config import LossConfig
from d2s.model import ModelConfig
from d2s.training.engine import EngineConfig
from d2s.training.optimizer import OptimConfig

RENAMED = {
    "log.evaluate_epochs": "validation.every_epochs",
    "log.keep": "checkpoint.keep",
    "log.max_stalled_restarts": "checkpoint.max_stalled_restarts",
    "log.save_minutes": "checkpoint.every_minutes",
    "log.save_steps": "checkpoint.every_steps",
}
"""Maps old names of fields, which may occur in saved configurations, to the new names."""


@settings("log")
class LogConfig(Settings):
    """How often metrics are written, and whether they also go to Weights & Biases."""

    every: PositiveInt = 10
    """Number of training steps between two rows of metrics."""
    wandb: str = ""
    """Name of a Weights & Biases project that gets the metrics too; empty for none."""


@settings("checkpoint")
class CheckpointConfig(Settings):
    """How many checkpoints are kept, and when they are written. One is also written before each validation."""

    keep: PositiveInt = 2
    """How many complete checkpoints to keep. The best model is stored separately."""
    every_steps: NonNegativeInt = 0
    """Write a checkpoint each time this many training steps are done; 0 for never."""
    every_minutes: NonNegativeFloat = 0.0
    """Write a checkpoint if the newest checkpoint is this many minutes old; 0 for never."""
    max_stalled_restarts: NonNegativeInt = 3
    """--resume fails after this many starts from the same checkpoint, if none wrote a newer one; 0 for no limit."""


@settings("validation")
class ValidationConfig(Settings):
    """When the model is validated on the val split."""

    every_epochs: PositiveInt = 1
    """Validate, and write a checkpoint, each time this many epochs are done. The last epoch is always validated."""


@settings()
class TrainConfig(Settings):
    """All settings of a run, except the paths of its data and its run folder."""

    recipe: str = ""
    """Name of the recipe that this configuration started from."""
    stage: Literal["pretrain", "finetune"] = "pretrain"
    """pretrain aligns images with dense captions. finetune aligns them with sparse captions, and may distill."""
    batch_size: PositiveInt = 128
    """Global batch size: number of pairs in a training step, over all workers."""
    epochs: PositiveInt = 30
    """Number of epochs. In finetune with data.sparse "all", an epoch is a pass over the training split's pairs of an
    image and a sparse caption. Otherwise it is a pass over the images."""
    max_steps: NonNegativeInt = 0
    """Number of training steps, also for the learning-rate schedule. 0 trains for all epochs."""
    samples_per_epoch: NonNegativeInt = 0
    """Number of samples in an epoch if --data is a stream of tars, which has no length."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    """Seed of the initial weights, the order of the samples, augmentation and dropout."""
    nonfinite_limit: PositiveInt = 20
    """A training step is skipped if its loss or gradient is NaN or infinite. Stop after this many in a row."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        if self.stage == "pretrain" and self.loss.distill_weight:
            raise ValueError(
                f"loss.distill_weight is {self.loss.distill_weight} in the pretrain stage, which has no teacher: "
                "set it to 0"
            )
        if self.data.image_size != self.model.image_size:
            raise ValueError(
                f"data.image_size {self.data.image_size} and model.image_size {self.model.image_size} differ: "
                "set both to the same"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Returns the configuration that `to_dict` saved. Earlier versions may have saved it, with old field names.

        Raises ValueError for an unknown field or an invalid value.
        """
        values = {name: dict(part) if isinstance(part, dict) else part for name, part in values.items()}
        for old, new in RENAMED.items():
            old_part, old_field = old.split(".")
            new_part, new_field = new.split(".")
            if old_field in values.get(old_part, {}):
                values.setdefault(new_part, {})[new_field] = values[old_part].pop(old_field)
        try:
            return super().from_dict(values)
        except ValueError as error:
            raise ValueError(f"the saved configuration does not fit this version of d2s: {error}") from error


def fields_of(config: Any, prefix: str = "") -> dict[str, Any]:
    """Returns all fields of a dataclass instance, with nested fields. The keys are dotted names after `prefix`."""
    found = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            found |= fields_of(value, f"{prefix}{item.name}.")
        else:
            found[f"{prefix}{item.name}"] = value
    return found


def differences(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Returns the old and the new value of each field that differs. The keys are dotted names."""
    before, after = fields_of(old), fields_of(new)
    pairs = {name: (before.get(name), after.get(name)) for name in sorted({*before, *after})}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def override(config: TrainConfig, arguments: list[str]) -> TrainConfig:
    """Returns a copy of `config` with fields set by command-line arguments such as `["--optim.lr", "1e-4"]`.

    If `--help` is among the arguments, prints every field with its meaning and exits. Raises ValueError, in one line,
    for an invalid value or an unknown field. If a field is unknown, the message suggests the most similar name.
    """
    known = fields_of(config)
    for argument in arguments:
        name = argument.removeprefix("--").split("=", 1)[0].replace("-", "_")
        if not argument.startswith("--") or name == "help" or _is_field(name, known):
            continue
        if name in RENAMED:
            raise ValueError(f"the field {name!r} is called {RENAMED[name]!r} now: give --{RENAMED[name]}")
        raise ValueError(f"there is no field {name!r}{did_you_mean(name, known)}")
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            changed = tyro.cli(
                TrainConfig,
                default=config,
                args=arguments,
                prog="train.py RECIPE",
                use_underscores=True,
                config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_first_complaint(errors.getvalue())) from None
    sys.stderr.write(errors.getvalue())  # warnings
    return changed


def _is_field(name: str, known: dict[str, Any]) -> bool:
    # A field may be a dictionary (a Hugging Face configuration). Its keys are given as dotted names too.
    return name in known or any(isinstance(v, dict) and name.startswith(f"{k}.") for k, v in known.items())


def _first_complaint(printed: str) -> str:
    """Returns tyro's error message as one line, without hints. printed: tyro's output, a box of several lines."""
    lines = [re.sub(r"[^\x20-\x7e]+", " ", line).strip(" -|") for line in printed.splitlines()]
    lines = [line for line in lines if line]
    body = lines[1:] if len(lines) > 1 else lines
    hints = ("Argument help", "For full help")
    end = next((number for number, line in enumerate(body) if line.startswith(hints)), None)
    complaint = " ".join(body[:end]) or "the overrides could not be read"
    # Error messages of settings already contain the field's full name. Only messages of towers need tyro's name.
    complaint = re.sub(r"^Error parsing ([\w.]+): tower\b", r"\1", complaint)
    return re.sub(r"^Error parsing [\w.]+: ", "", complaint)
