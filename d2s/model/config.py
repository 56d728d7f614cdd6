"""Defines the settings of a model, and finds settings that have no effect because of other settings."""

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
    """Selects an encoder ("tower"). On the command line it is model.image_encoder or model.text_encoder."""

    name: str | None = None
    """Name on the hub, a folder, or `package:<module>/<folder>` for a folder in an installed package."""
    config: dict[str, Any] | None = None
    """Hugging Face configuration of a tower with random weights. It must contain `model_type`."""
    pretrained: bool = True
    """Load the weights of `name`. If `name` is None, this has no effect, and building the model warns."""
    freeze: bool = False
    """Do not train the tower. It then stays in eval mode, without gradient or optimizer state."""
    layers: PositiveInt | None = None
    """Number of layers to keep, counted from the tower's input; None keeps all."""
    tokenizer: str | None = None
    """Tokenizer of a text tower: a name or folder; None uses `name`; "words" builds one from captions."""

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
    """Settings of stage 2's decoder. Its mask tokens stand for words that a sparse caption leaves out."""

    tokens: PositiveInt = 100
    """Number of learnable mask tokens."""
    layout: Layout = "surround"
    """Positions of the mask tokens: half before and half after the words (surround), all before the words
    (prefix), or all after the words (postfix). The layout changes only rounding, because the decoder has no
    position code and averages its mask tokens. Building a model warns if the layout is not the default."""
    depth: PositiveInt = 4
    """Number of transformer blocks."""
    heads: PositiveInt = 4
    """Number of attention heads; it must divide the model's width."""
    mlp_ratio: PositiveFloat = 4.0
    """Hidden width of a block's MLP, as a multiple of the model's width."""


@settings("model")
class ModelConfig(Settings):
    """Holds all settings that decide the shape and the behaviour of a `D2SModel`."""

    image_encoder: TowerConfig = TowerConfig(name="google/vit-base-patch16-224-in21k")
    """Selects the image tower."""
    text_encoder: TowerConfig = TowerConfig(name="google-bert/bert-base-uncased")
    """Selects the text tower."""
    width: EvenWidth = 512
    """Width D of the embeddings of images and texts."""
    image_size: PositiveInt = 224
    """Side of the square input image, in pixels."""
    max_words: Annotated[int, Field(ge=3)] = 256
    """Maximum word pieces of a text, start and end included; `encode_text` cuts longer texts."""
    decoder: DecoderConfig | None = None
    """Settings of the decoder; None for a stage-1 model, which has no decoder."""
    image_mean: Color = IMAGENET_MEAN
    """Mean of red, green and blue, each from 0 to 1. It is subtracted from the images."""
    image_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = IMAGENET_STD
    """Standard deviation of red, green and blue. The images are divided by it."""
    token_dropout: Share = 0.8
    """Share of the training images that lose tokens (size augmentation); 0 turns this off."""
    token_dropout_min: Share = 0.04
    """Smallest rate at which an image that `token_dropout` selects loses its tokens."""
    token_dropout_max: Share = 0.2
    """Largest rate at which an image that `token_dropout` selects loses its tokens."""
    text_dropout: Share = 0.2
    """Dropout rate on the text tower's output in training."""
    text_norm: bool = True
    """Apply LayerNorm to the pooled text embedding."""
    text_mlp_norm: MlpNorm = "batch"
    """Norm inside the word MLP: "batch" (BatchNorm over the words of all workers) or "layer" (LayerNorm)."""
    gpo_width: EvenWidth = 32
    """Width of the pooling operator's position code and GRU."""
    gpo_temperature: PositiveFloat = 0.1
    """Temperature of the softmax that computes the pooling weights."""
    compat_decoder_padding: bool = False
    """Let the decoder attend also to padding, as the authors' released code does."""
    compat_unit_prompt: bool = False
    """In eval mode, scale the prompt to length 1 before adding it, as the authors' released code does."""
    compat_batch_norm: bool = False
    """Compute BatchNorm statistics on each worker separately and include padding, as the release does."""

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
    """Warns that a setting has no effect, or has another effect than its name suggests."""


def idle_settings(config: ModelConfig, changed: Collection[str] | None = None) -> list[str]:
    """Returns one line of text for each setting that has no effect.

    changed: None for a new model. For a saved model, the names of the fields that the user changed. Towers
    are checked only in a new model, because the towers of a saved model always have trained weights.
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
    # `compat_decoder_padding` suppresses this warning, because the _compat recipes set both.
    decoder = config.decoder if changed is None or "decoder" in changed else None
    if decoder is not None and decoder.layout != "surround" and not config.compat_decoder_padding:
        lines.append(
            f"model.decoder.layout={decoder.layout!r} has no effect: the prompt is a mean over the tokens"
        )
    return lines
