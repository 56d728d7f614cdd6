"""Settings of a model, and a check for settings that have no effect in combination with the others."""

from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from d2s.common.settings import Settings, settings

Layout = Literal["surround", "prefix", "postfix"]
MlpNorm = Literal["batch", "layer"]
EvenWidth = Annotated[int, Field(ge=2, multiple_of=2)]
Share = Annotated[float, Field(ge=0, le=1)]
Color = tuple[float, float, float]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@settings("tower")
class TowerConfig(Settings):
    """Selects an encoder ("tower"). Command line: model.image_encoder or model.text_encoder."""

    name: str | None = None
    """Name on the hub, folder, or `package:<module>/<folder>`: a folder in an installed package."""
    config: dict[str, Any] | None = None
    """Fields of a Hugging Face configuration, including `model_type`, for a tower with random weights."""
    pretrained: bool = True
    """Load the weights of `name`. Without a name it has no effect, and building the model warns."""
    freeze: bool = False
    """Do not train the tower: it stays in eval mode, without gradient or optimizer state."""
    layers: PositiveInt | None = None
    """How many of the tower's first layers to keep; None keeps all."""
    tokenizer: str | None = None
    """For text towers: the tokenizer's place. None means `name`; "words" builds one from captions."""

    def __post_init__(self) -> None:
        if (self.name is None) == (self.config is None):
            raise ValueError(
                f"tower.name is {self.name!r} and tower.config {'not ' if self.config is None else ''}set: give "
                "either a name (hub, folder, package:) or a config with model_type, and not both"
            )
        if self.config is not None and not isinstance(kind := self.config.get("model_type"), str):
            raise ValueError(f"tower.config.model_type is {kind!r}: name a Hugging Face model type")


@settings("model.decoder")
class DecoderConfig(Settings):
    """The decoder of stage 2. Its mask tokens stand for the words that a sparse caption leaves out."""

    tokens: PositiveInt = 100
    """Number of learnable mask tokens."""
    layout: Layout = "surround"
    """Where the mask tokens stand: half on each side of the words (surround), all before (prefix) or all
    after them (postfix). The decoder has no position code and averages its mask tokens, so the layout changes
    only rounding. Building a model with another layout than the default warns."""
    depth: PositiveInt = 4
    """Number of transformer blocks."""
    heads: PositiveInt = 4
    """Number of attention heads; it must divide the model's width."""
    mlp_ratio: PositiveFloat = 4.0
    """Hidden width of a block's MLP, as a multiple of the model's width."""


@settings("model")
class ModelConfig(Settings):
    """All settings that decide the shape and the behaviour of a `D2SModel`."""

    image_encoder: TowerConfig = TowerConfig(name="google/vit-base-patch16-224-in21k")
    """The image tower."""
    text_encoder: TowerConfig = TowerConfig(name="google-bert/bert-base-uncased")
    """The text tower."""
    width: EvenWidth = 512
    """Width D of the shared embedding."""
    image_size: PositiveInt = 224
    """Side of the square input image, in pixels."""
    max_words: Annotated[int, Field(ge=3)] = 256
    """Maximum length of a text in `encode_text`, in word pieces with start and end; longer texts are cut."""
    decoder: DecoderConfig | None = None
    """The decoder of stage 2; None for a stage-1 model."""
    image_mean: Color = IMAGENET_MEAN
    """Mean of red, green and blue (0 to 1), which is subtracted from the images."""
    image_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = IMAGENET_STD
    """Standard deviation of red, green and blue, by which the images are divided."""
    token_dropout: Share = 0.8
    """Share of the training images that lose some of their tokens; 0 turns size augmentation off."""
    token_dropout_min: Share = 0.04
    """Smallest rate at which such an image loses tokens."""
    token_dropout_max: Share = 0.2
    """Largest rate at which such an image loses tokens."""
    text_dropout: Share = 0.2
    """Dropout rate on the text tower's output in training."""
    text_norm: bool = True
    """Apply LayerNorm to the pooled text embedding."""
    text_mlp_norm: MlpNorm = "batch"
    """Norm inside the word MLP: BatchNorm over the real words of all workers, or LayerNorm."""
    gpo_width: EvenWidth = 32
    """Width of the position code and of the GRU in the pooling operator."""
    gpo_temperature: PositiveFloat = 0.1
    """Temperature of the softmax over pooling positions."""
    compat_decoder_padding: bool = False
    """As in the authors' release: the decoder also attends to padding."""
    compat_unit_prompt: bool = False
    """As in the authors' release: in eval mode the prompt is scaled to length 1 before it is added."""
    compat_batch_norm: bool = False
    """As in the authors' release: BatchNorm statistics include padding, and each worker computes its own."""

    def __post_init__(self) -> None:
        if self.token_dropout_min > self.token_dropout_max:
            raise ValueError(
                f"model.token_dropout_min is {self.token_dropout_min}: it must not exceed "
                f"model.token_dropout_max {self.token_dropout_max}"
            )
        if self.decoder is not None and self.width % self.decoder.heads:
            raise ValueError(
                f"model.decoder.heads is {self.decoder.heads}: it must divide model.width {self.width}"
            )


class IdleSetting(UserWarning):
    """Warns that a setting has no effect, or not the effect that its name suggests."""


def idle_settings(config: ModelConfig, changed: Collection[str] | None = None) -> list[str]:
    """Returns one line of text for each setting that has no effect.

    changed: None if a new model is built, else the fields that the user changed in a saved model. Towers are
    checked only for a new model, because those of a saved model always have trained weights.
    """
    lines = []
    for field in ("image_encoder", "text_encoder") if changed is None else ():
        tower: TowerConfig = getattr(config, field)
        if tower.name is None and tower.pretrained:
            lines.append(
                f"model.{field}.pretrained=True has no effect without a name: the tower starts from random weights, "
                "name one or set pretrained=False"
            )
        if tower.freeze and (tower.name is None or not tower.pretrained):
            lines.append(
                f"model.{field}.freeze=True keeps a tower with random weights as it is: it learns nothing"
            )
    # No warning with compat_decoder_padding: recipes of the authors' release set both together.
    decoder = config.decoder if changed is None or "decoder" in changed else None
    if decoder is not None and decoder.layout != "surround" and not config.compat_decoder_padding:
        lines.append(
            f"model.decoder.layout={decoder.layout!r} has no effect: the prompt is a mean over the tokens"
        )
    return lines
