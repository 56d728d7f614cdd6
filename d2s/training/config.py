"""The whole configuration of a run, and the command line's overrides of it.

Each part stands beside the code that uses it; a recipe (:mod:`d2s.training.recipes`) is a function that
returns a whole :class:`TrainConfig`. Overrides are fields' dotted names: `--optim.lr 1e-4 --loss.distill_weight 0`.
"""

import contextlib
import dataclasses
import difflib
import io
import re
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

import tyro

from d2s.data.batches import DataConfig
from d2s.losses.objective import LossConfig
from d2s.model import ModelConfig
from d2s.training.engine import EngineConfig
from d2s.training.optimizer import OptimConfig


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written how often."""

    every: int = 10
    """Steps between two rows of metrics."""
    evaluate_epochs: int = 1
    """Epochs between two validations (and checkpoints); the last epoch is always validated."""
    keep: int = 2
    """Complete checkpoints to keep; the best model is kept apart."""
    save_steps: int = 0
    """Steps between two further checkpoints within an epoch; 0 for none."""
    save_minutes: float = 0.0
    """Minutes after which a further checkpoint is written; 0 for none."""
    max_stalled_restarts: int = 3
    """Starts in a row from one checkpoint, none of which saved a newer one, before --resume stops; 0 for any."""
    wandb: str = ""
    """Weights & Biases project to mirror the metrics to; empty for none."""

    def __post_init__(self) -> None:
        for name in ("every", "evaluate_epochs", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"log.{name} is {getattr(self, name)}: it must be 1 or more")
        for name in ("save_steps", "save_minutes", "max_stalled_restarts"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"log.{name} is {getattr(self, name)}: it must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run, apart from where its data and folder lie."""

    recipe: str = ""
    """Name of the recipe that this configuration started from."""
    stage: Literal["pretrain", "finetune"] = "pretrain"
    """pretrain aligns images with dense captions, finetune with sparse ones, with distillation if weighted."""
    batch_size: int = 128
    """Global batch: pairs a step, over all workers."""
    epochs: int = 30
    """Passes over the training split: over its images in pretrain, over its image-caption pairs in finetune
    (its images where data.sparse is "one")."""
    max_steps: int = 0
    """Stop after this many optimization steps, and plan the schedule for them; 0 for all epochs."""
    samples_per_epoch: int = 0
    """Visits that make an epoch where --data is a stream of tars, which has no length of its own."""
    seed: int = 0
    """Decides weights, order, augmentation and dropout."""
    nonfinite_limit: int = 20
    """Steps in a row with a loss or gradient that is not finite, skipped by all workers, before the run stops."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        for name, least in (
            ("batch_size", 1),
            ("epochs", 1),
            ("max_steps", 0),
            ("samples_per_epoch", 0),
            ("nonfinite_limit", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be {least} or more")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}: it must be 0 or more, and below 2**63")
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


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as JSON-serialisable dictionaries."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """The configuration that :func:`to_dict` gave, after a way through JSON. ValueError for an unknown field."""
    parts = {
        "data": DataConfig,
        "loss": LossConfig,
        "optim": OptimConfig,
        "engine": EngineConfig,
        "log": LogConfig,
    }
    values = dict(values)
    try:
        for name, kind in parts.items():
            fields = {key: tuple(v) if isinstance(v, list) else v for key, v in values[name].items()}
            values[name] = kind(**fields)
        values["model"] = ModelConfig.from_dict(values["model"])
        return TrainConfig(**values)
    except (TypeError, KeyError) as error:
        raise ValueError(f"the saved configuration does not fit this version of d2s: {error}") from error


def field_names(config: Any) -> set[str]:
    """The names of a dataclass's own fields."""
    return {item.name for item in dataclasses.fields(config)}


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
    """Dotted names at which two configurations differ, with both values."""
    before, after = fields_of(old), fields_of(new)
    names = sorted({*before, *after})
    pairs = {name: (before.get(name), after.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def override(config: TrainConfig, arguments: list[str]) -> TrainConfig:
    """`config` with command-line overrides such as `["--optim.lr", "1e-4"]` applied and validated.

    Raises ValueError, in one line, for a field that does not exist (naming the nearest) or a value that does
    not fit. `--help` among the arguments prints every field with its meaning and leaves.
    """
    known = fields_of(config)
    for argument in arguments:
        name = argument.removeprefix("--").split("=", 1)[0].replace("-", "_")
        if argument.startswith("--") and name != "help" and not _is_field(name, known):
            raise ValueError(f"there is no field {name!r}{_nearest(name, known)}")
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
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


def _is_field(name: str, known: dict[str, Any]) -> bool:
    # A dictionary field (a Hugging Face configuration) takes its keys as further dotted names.
    return name in known or any(isinstance(v, dict) and name.startswith(f"{k}.") for k, v in known.items())


def _nearest(name: str, names: typing.Iterable[str]) -> str:
    match = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    return f"; did you mean {match[0]!r}?" if match else ""


def _first_complaint(printed: str) -> str:
    """tyro explains in a box of several lines; a user's mistake deserves one."""
    lines = [re.sub(r"[^\x20-\x7e]+", " ", line).strip(" -|") for line in printed.splitlines()]
    lines = [line for line in lines if line]
    body = lines[1:] if len(lines) > 1 else lines
    end = next(
        (n for n, line in enumerate(body) if line.startswith(("Argument help", "For full help"))), None
    )
    return " ".join(body[:end]) or "the overrides could not be read"
