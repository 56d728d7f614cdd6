"""Settings of a model: frozen dataclasses that check themselves and travel as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

Layout = Literal["surround", "prefix", "postfix"]
MlpNorm = Literal["batch", "layer"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _require(condition: bool, field: str, value: object, remedy: str) -> None:
    """Raise a one-line ValueError that names the field, its value and the remedy."""
    if not condition:
        raise ValueError(f"{field}={value!r}: {remedy}")


_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text",
    dict: "a dictionary",
}


def _is_of(value: object, kind: Any) -> bool:
    """Whether a value fits an annotation of the dataclasses below; a tuple may come as a list, out of JSON."""
    if isinstance(kind, types.UnionType):
        return any(_is_of(value, one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, tuple | list) and all(_is_of(item, get_args(kind)[0]) for item in value)
    if get_origin(kind) is Literal:
        return isinstance(value, str)
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, get_origin(kind) or kind)


def _wanted(kind: Any) -> str:
    if isinstance(kind, types.UnionType):
        return " or ".join(_wanted(one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        return "three finite numbers"
    if kind is type(None):
        return "nothing (null)"
    known = str if get_origin(kind) is Literal else get_origin(kind) or kind
    return _NAMES.get(known, f"the fields of a {getattr(kind, '__name__', kind)}")


class _Settings:
    """JSON in both directions and the types of the fields, shared by the dataclasses below."""

    def _check_types(self, prefix: str) -> None:
        """ValueError names the first field, after the prefix, whose value does not fit its annotation."""
        for name, kind in typing.get_type_hints(type(self)).items():
            value = getattr(self, name)
            if not _is_of(value, kind):
                raise ValueError(f"{prefix}.{name}={repr(value)[:60]}: give {_wanted(kind)}")

    def to_dict(self) -> dict[str, Any]:
        """The settings as a dictionary of plain JSON types."""
        return json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[call-overload]

    @classmethod
    def _known(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Return a copy of `values`; ValueError names the first key that is no field of this class."""
        if not isinstance(values, dict):
            raise ValueError(f"{cls.__name__}: got {type(values).__name__}, give a dictionary of its fields")
        names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for key in values:
            if key not in names:
                raise ValueError(f"{cls.__name__}: unknown field {key!r}, the fields are {', '.join(names)}")
        return dict(values)

    @classmethod
    def from_dict(cls, values: dict[str, Any]):
        """Build the settings from what `to_dict` gave. Raises ValueError on an unknown key or a bad value."""
        return cls(**cls._known(values))


@dataclass(frozen=True, kw_only=True)
class TowerConfig(_Settings):
    """Where an encoder ("tower") comes from, and how it is used."""

    name: str | None = None
    """Hub name, local folder, or `package:<module>/<folder>`: a folder inside an installed Python package."""
    config: dict[str, Any] | None = None
    """Fields of a Hugging Face configuration, `model_type` included: a tower with random weights."""
    pretrained: bool = True
    """Load the weights that belong to `name`; without a name it has no effect, and building the model warns."""
    freeze: bool = False
    """Keep the tower as it is: eval mode, no gradient, not given to the optimizer."""
    layers: int | None = None
    """Keep only the first so many layers of the tower; None keeps all."""
    tokenizer: str | None = None
    """Text towers: where the tokenizer is; None means `name`, "words" a vocabulary made from captions."""

    def __post_init__(self) -> None:
        self._check_types("tower")
        _require(
            (self.name is None) != (self.config is None),
            "tower.name",
            self.name,
            "give either a name (hub, folder, package:) or a config with model_type, and not both",
        )
        if self.config is not None:
            kind = self.config.get("model_type")
            _require(isinstance(kind, str), "tower.config.model_type", kind, "name a Hugging Face type")
        _require(
            self.layers is None or self.layers >= 1, "tower.layers", self.layers, "use 1 or more, or None"
        )


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(_Settings):
    """The decoder of stage 2, whose mask tokens stand for the words that a sparse caption leaves out."""

    tokens: int = 100
    """Number of learnable mask tokens."""
    layout: Layout = "surround"
    """Where the mask tokens stand: half on each side of the words, before, or after them. The decoder has no
    position code and reads the mask tokens by their mean, so the choice changes rounding only, and building the
    model with another than the default warns."""
    depth: int = 4
    """Transformer blocks."""
    heads: int = 4
    """Attention heads; they must divide the model's width."""
    mlp_ratio: float = 4.0
    """Hidden width of a block's MLP, as a multiple of the model's width."""

    def __post_init__(self) -> None:
        self._check_types("decoder")
        _require(self.tokens >= 1, "decoder.tokens", self.tokens, "use 1 or more")
        _require(
            self.layout in get_args(Layout), "decoder.layout", self.layout, f"use one of {get_args(Layout)}"
        )
        _require(self.depth >= 1, "decoder.depth", self.depth, "use 1 or more")
        _require(self.heads >= 1, "decoder.heads", self.heads, "use 1 or more")
        _require(self.mlp_ratio > 0, "decoder.mlp_ratio", self.mlp_ratio, "use a positive number")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_Settings):
    """Everything that decides the shape and the behaviour of a `D2SModel`."""

    image_encoder: TowerConfig = TowerConfig(name="google/vit-base-patch16-224-in21k")
    """The image tower."""
    text_encoder: TowerConfig = TowerConfig(name="google-bert/bert-base-uncased")
    """The text tower."""
    width: int = 512
    """Width D of the shared embedding."""
    image_size: int = 224
    """Side of the square input image, in pixels."""
    max_words: int = 256
    """Longest text in word pieces that `encode_text` reads; longer ones are cut."""
    decoder: DecoderConfig | None = None
    """The decoder of stage 2; None is a stage-1 model."""
    image_mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of red, green and blue (0 to 1), taken off the images."""
    image_std: tuple[float, float, float] = IMAGENET_STD
    """Standard deviation of red, green and blue, by which the images are divided."""
    token_dropout: float = 0.8
    """Share of the training images that lose some of their tokens; 0 turns size augmentation off."""
    token_dropout_min: float = 0.04
    """Smallest rate at which such an image loses tokens."""
    token_dropout_max: float = 0.2
    """Largest rate at which such an image loses tokens."""
    text_dropout: float = 0.2
    """Dropout on the text tower's output, in training."""
    text_norm: bool = True
    """LayerNorm on the pooled text embedding."""
    text_mlp_norm: MlpNorm = "batch"
    """Norm inside the word MLP: BatchNorm over the real words of all workers, or LayerNorm."""
    gpo_width: int = 32
    """Width of the pooling operator's position code and of its GRU."""
    gpo_temperature: float = 0.1
    """Temperature of the softmax over pooling positions."""
    compat_decoder_padding: bool = False
    """As the authors' release: the decoder attends to padded words."""
    compat_unit_prompt: bool = False
    """As the authors' release: in eval mode the prompt is scaled to length 1 before it is added."""
    compat_batch_norm: bool = False
    """As the authors' release: BatchNorm statistics over padding too, each worker by itself."""

    def __post_init__(self) -> None:
        self._check_types("model")
        for field in ("image_mean", "image_std"):
            value = tuple(getattr(self, field))
            object.__setattr__(self, field, value)
            _require(len(value) == 3, f"model.{field}", value, "give three numbers: red, green, blue")
        _require(min(self.image_std) > 0, "model.image_std", self.image_std, "use positive numbers")
        _require(
            self.max_words >= 3, "model.max_words", self.max_words, "use 3 or more: two mark start and end"
        )
        for field in ("width", "image_size", "gpo_width"):
            _require(getattr(self, field) >= 1, f"model.{field}", getattr(self, field), "use 1 or more")
        for field in ("width", "gpo_width"):
            _require(
                getattr(self, field) % 2 == 0, f"model.{field}", getattr(self, field), "use an even number"
            )
        for field in ("token_dropout", "token_dropout_min", "token_dropout_max", "text_dropout"):
            value = getattr(self, field)
            _require(0.0 <= value <= 1.0, f"model.{field}", value, "use a share between 0 and 1")
        _require(
            self.token_dropout_min <= self.token_dropout_max,
            "model.token_dropout_min",
            self.token_dropout_min,
            f"must not exceed token_dropout_max={self.token_dropout_max}",
        )
        _require(
            self.gpo_temperature > 0, "model.gpo_temperature", self.gpo_temperature, "use a positive number"
        )
        norms = get_args(MlpNorm)
        _require(
            self.text_mlp_norm in norms, "model.text_mlp_norm", self.text_mlp_norm, f"use one of {norms}"
        )
        if self.decoder is not None:
            heads = self.decoder.heads
            _require(self.width % heads == 0, "decoder.heads", heads, f"must divide model.width={self.width}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Build the settings from what `to_dict` gave. Raises ValueError on an unknown key or a bad value."""
        values = cls._known(values)
        for field in ("image_encoder", "text_encoder"):
            if isinstance(values.get(field), dict):
                values[field] = TowerConfig.from_dict(values[field])
        if isinstance(values.get("decoder"), dict):
            values["decoder"] = DecoderConfig.from_dict(values["decoder"])
        return cls(**values)


class IdleSetting(UserWarning):
    """A setting that changes nothing, or not what its name says, under the others."""


def idle_settings(config: ModelConfig, changed: Collection[str] | None = None) -> list[str]:
    """A line for each setting without effect in a model that is built, or loaded with the fields `changed`.

    A tower of a loaded model has its saved weights, whatever its name.
    """
    found = []
    for field in ("image_encoder", "text_encoder") if changed is None else ():
        tower: TowerConfig = getattr(config, field)
        if tower.name is None and tower.pretrained:
            found.append(
                f"model.{field}.pretrained=True has no effect without a name: the tower starts from random weights, "
                "name one or set pretrained=False"
            )
        if tower.freeze and (tower.name is None or not tower.pretrained):
            found.append(
                f"model.{field}.freeze=True keeps a tower with random weights as it is: it learns nothing"
            )
    # The recipes of the release note its layout together with its switches.
    decoder = config.decoder if changed is None or "decoder" in changed else None
    if decoder is not None and decoder.layout != "surround" and not config.compat_decoder_padding:
        found.append(
            f"model.decoder.layout={decoder.layout!r} has no effect: the prompt is a mean over the tokens"
        )
    return found
