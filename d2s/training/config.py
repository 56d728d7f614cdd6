"""The whole configuration of a run, and the command line's overrides of it.

The settings of each part stand beside the code that uses them; a recipe (:mod:`d2s.training.recipes`) is a function
that returns a whole :class:`TrainConfig`. Overrides name fields: `--optim.lr 1e-4 --loss.distill_weight 0`.
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
"""Former names of fields, still read in saved configurations."""


@settings("log")
class LogConfig(Settings):
    """How often metrics are written, and where to."""

    every: PositiveInt = 10
    """Steps between two rows of metrics."""
    wandb: str = ""
    """Weights & Biases project to mirror the metrics to; empty for none."""


@settings("checkpoint")
class CheckpointConfig(Settings):
    """When checkpoints are written besides those before each validation, and how many are kept."""

    keep: PositiveInt = 2
    """Complete checkpoints to keep; the best model is stored apart from them."""
    every_steps: NonNegativeInt = 0
    """Steps between two further checkpoints; 0 for none."""
    every_minutes: NonNegativeFloat = 0.0
    """Minutes after the newest checkpoint at which a further one is written; 0 for none."""
    max_stalled_restarts: NonNegativeInt = 3
    """Starts from the same checkpoint, without a newer one saved, after which --resume refuses; 0 for no limit."""


@settings("validation")
class ValidationConfig(Settings):
    """When the model is validated on the val split."""

    every_epochs: PositiveInt = 1
    """Epochs between two validations, each with a checkpoint; the last epoch is always validated."""


@settings()
class TrainConfig(Settings):
    """Everything that decides a run, except where its data and folder are."""

    recipe: str = ""
    """Name of the recipe that this configuration started from."""
    stage: Literal["pretrain", "finetune"] = "pretrain"
    """pretrain aligns images with dense captions, finetune with sparse ones, with distillation if weighted."""
    batch_size: PositiveInt = 128
    """Global batch: pairs per step, over all workers."""
    epochs: PositiveInt = 30
    """Passes over the training split: over its images in pretrain, over its image-caption pairs in finetune
    (its images where data.sparse is "one")."""
    max_steps: NonNegativeInt = 0
    """Stop after this many optimization steps, and plan the schedule for them; 0 for all epochs."""
    samples_per_epoch: NonNegativeInt = 0
    """Samples that count as an epoch where --data is a stream of tars, which has no length of its own."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    """Decides initial weights, order, augmentation and dropout."""
    nonfinite_limit: PositiveInt = 20
    """Consecutive steps with a loss or gradient that is not finite (all workers skip them) before the run stops."""
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
        """The configuration that `to_dict` gave, also in an earlier version, with its names of fields.

        Raises ValueError for an unknown field or a value that does not fit.
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
    """Dotted names and values of every plain field below a dataclass instance."""
    found = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            found |= fields_of(value, f"{prefix}{item.name}.")
        else:
            found[f"{prefix}{item.name}"] = value
    return found


def differences(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Dotted names of the fields in which two configurations differ, with both values."""
    before, after = fields_of(old), fields_of(new)
    pairs = {name: (before.get(name), after.get(name)) for name in sorted({*before, *after})}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def override(config: TrainConfig, arguments: list[str]) -> TrainConfig:
    """`config` with command-line overrides such as `["--optim.lr", "1e-4"]` applied and validated.

    Raises ValueError, in one line, for a field that does not exist (naming the nearest) or a value that does
    not fit. `--help` among the arguments prints every field with its meaning and exits.
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
    # A dictionary field (a Hugging Face configuration) takes its keys as further dotted names.
    return name in known or any(isinstance(v, dict) and name.startswith(f"{k}.") for k, v in known.items())


def _first_complaint(printed: str) -> str:
    """tyro's error message, printed as a box of several lines, as one line without its hints."""
    lines = [re.sub(r"[^\x20-\x7e]+", " ", line).strip(" -|") for line in printed.splitlines()]
    lines = [line for line in lines if line]
    body = lines[1:] if len(lines) > 1 else lines
    hints = ("Argument help", "For full help")
    end = next((number for number, line in enumerate(body) if line.startswith(hints)), None)
    complaint = " ".join(body[:end]) or "the overrides could not be read"
    # Settings name their fields themselves, except a tower, which does not know where it is used.
    complaint = re.sub(r"^Error parsing ([\w.]+): tower\b", r"\1", complaint)
    return re.sub(r"^Error parsing [\w.]+: ", "", complaint)
