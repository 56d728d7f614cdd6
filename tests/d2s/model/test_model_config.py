"""Settings: checked, frozen, and the same after a way through JSON."""

import dataclasses
import json
import math

import pytest
from model_towers import small_vit, tiny_config

from d2s.model import DecoderConfig, ModelConfig, TowerConfig, presets


def test_json_round_trip():
    for config in (tiny_config(), tiny_config(decoder=None), ModelConfig()):
        text = json.dumps(config.to_dict())
        assert ModelConfig.from_dict(json.loads(text)) == config


def test_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny_config().width = 3
    with pytest.raises(TypeError):
        DecoderConfig(100)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: ModelConfig.from_dict({"widht": 3}), ["widht", "width"]),
        (lambda: ModelConfig.from_dict({"decoder": {"tokns": 3}}), ["tokns", "tokens"]),
        (lambda: TowerConfig(), ["tower.name", "model_type"]),
        (lambda: TowerConfig(name="a", config={"model_type": "vit"}), ["tower.name", "'a'", "not both"]),
        (lambda: TowerConfig(config={"hidden_size": 3}), ["model_type"]),
        (lambda: TowerConfig(name="a", layers=0), ["tower.layers", "0"]),
        (lambda: DecoderConfig(layout="middle"), ["decoder.layout", "middle", "surround"]),
        (lambda: DecoderConfig(tokens=0), ["decoder.tokens", "0"]),
        (lambda: tiny_config(width=15), ["model.width is 15", "multiple of 2"]),
        (lambda: tiny_config(decoder=DecoderConfig(heads=3)), ["model.decoder.heads is 3", "model.width 16"]),
        (lambda: tiny_config(text_mlp_norm="group"), ["model.text_mlp_norm", "group", "layer"]),
        (lambda: tiny_config(token_dropout_min=0.3), ["token_dropout_min", "0.3", "0.2"]),
        (lambda: tiny_config(image_std=(1.0, 1.0, 0.0)), ["model.image_std is 0.0", "greater than 0"]),
        (lambda: tiny_config(image_mean=(1.0, 1.0)), ["image_mean is (1.0, 1.0)", "too few"]),
        (lambda: tiny_config(text_dropout=1.5), ["text_dropout", "1.5"]),
        (lambda: tiny_config(gpo_temperature=0.0), ["gpo_temperature is 0.0", "greater than 0"]),
        (lambda: tiny_config(max_words=2), ["model.max_words is 2", "greater than or equal to 3"]),
        (lambda: tiny_config(gpo_temperature=math.inf), ["gpo_temperature", "inf", "finite"]),
        (lambda: tiny_config(text_dropout=math.nan), ["text_dropout", "nan", "finite"]),
        (lambda: tiny_config(image_mean=(0.5, math.nan, 0.5)), ["image_mean", "nan", "finite"]),
        (lambda: DecoderConfig(mlp_ratio=math.inf), ["decoder.mlp_ratio", "inf", "finite"]),
        (lambda: DecoderConfig(heads=2.0), ["decoder.heads", "2.0", "integer"]),
        (lambda: tiny_config(width=True), ["model.width", "True", "integer"]),
        (lambda: tiny_config(image_mean=5), ["model.image_mean is 5", "tuple"]),
        (lambda: tiny_config(text_norm="no"), ["model.text_norm", "no", "boolean"]),
        (lambda: ModelConfig.from_dict({"image_encoder": 5}), ["model.image_encoder is 5", "object"]),
        (
            lambda: ModelConfig.from_dict({"image_encoder": {"name": 5}}),
            ["model.image_encoder.name is 5", "string"],
        ),
        (lambda: ModelConfig.from_dict({"decoder": []}), ["model.decoder is []", "object"]),
        (lambda: ModelConfig.from_dict([]), ["model is []", "object"]),
        (lambda: TowerConfig(config=[1]), ["tower.config is [1]", "dictionary"]),
    ],
)
def test_mistakes_are_named_in_one_line(build, words):
    with pytest.raises(ValueError) as caught:
        build()
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text


def test_every_field_is_described():
    """The plain string after each field is its documentation."""
    import ast
    import inspect

    from d2s.model import config

    for node in ast.parse(inspect.getsource(config)).body:
        if isinstance(node, ast.ClassDef):
            for field, after in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign):
                    assert isinstance(after, ast.Expr), f"{node.name}.{field.target.id}"


def test_presets_are_valid():
    towers = [
        presets.VIT_B16,
        presets.swin_b(224),
        presets.swin_b(384),
        presets.BERT_BASE,
        presets.minilm(),
    ]
    towers += [presets.small_resnet(), small_vit(), presets.small_bert()]
    assert all(TowerConfig.from_dict(tower.to_dict()) == tower for tower in towers)
    assert "window12-384" in presets.swin_b(480).name
