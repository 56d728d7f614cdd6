"""A pretrained tower has all its weights from its folder, or is refused."""

import json
import shutil
import warnings

import pytest
import torch
from model_towers import BERT, VISION, tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, CLIPConfig, CLIPModel, ViTForImageClassification

from d2s.model import D2SModel, TowerConfig, build_word_tokenizer
from d2s.model.release_importer import read_checkpoint
from d2s.model.towers import build_tower

WEIGHTS = "model.safetensors"


def saved(folder, fields, make=AutoModel.from_config):
    torch.manual_seed(0)
    config = AutoConfig.for_model(**fields)
    make(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("vit"), VISION["vit"])


@pytest.fixture
def copied(vit, tmp_path):
    return shutil.copytree(vit, tmp_path / "copied")


def change(folder, edit):
    state = edit(load_file(folder / WEIGHTS))
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def load(folder, kind="vision", **fields):
    sizes = {"image_size": 48} if kind == "vision" else {}
    return build_tower(TowerConfig(name=str(folder), **fields), kind, **sizes)


def refusal(folder, *words, **arguments):
    with pytest.raises(ValueError) as error:
        load(folder, **arguments)
    line = str(error.value)
    assert "\n" not in line
    assert str(folder) in line
    assert all(word in line for word in words), line


def test_a_tower_says_how_many_weights_it_has(vit, capsys):
    stored = AutoModel.from_pretrained(vit).state_dict()
    capsys.readouterr()
    state = load(vit).state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in state.items())
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"tower name {str(vit)!r}: {len(state)} weights loaded, none missing, without 2 that it does not need "
        "(pooler.dense.bias, pooler.dense.weight)"
    ]


def test_a_head_and_a_missing_pooler_are_not_needed(tmp_path, capsys):
    folder = saved(tmp_path, VISION["vit"], ViTForImageClassification)
    assert all(torch.isfinite(value).all() for value in load(folder).state_dict().values())
    said = capsys.readouterr().err
    assert "none missing, without 2 that it does not need (classifier.bias, classifier.weight)" in said


@pytest.mark.parametrize("prefix", ["visual.trunk.", "visual.", "model.0."])
def test_weights_under_foreign_names_are_refused(copied, prefix):
    change(copied, lambda state: {prefix + name: value for name, value in state.items()})
    refusal(
        copied,
        "38 of its 38 weights are missing (embeddings.cls_token,",
        prefix + "embeddings.cls_token",
        "pretrained",
    )


def test_a_missing_layer_is_refused(copied):
    change(copied, lambda state: {name: value for name, value in state.items() if ".1." not in name})
    refusal(copied, "16 of its 38 weights are missing (layers.1.", "and 13 more", "set pretrained to False")


@pytest.mark.parametrize("kind, model_type", [("vision", "resnet"), ("vision", "swin"), ("text", "bert")])
def test_one_missing_weight_of_any_tower_is_refused(tmp_path, kind, model_type):
    folder = saved(tmp_path, BERT if kind == "text" else VISION[model_type])
    buffers = [name for name in load_file(folder / WEIGHTS) if name.endswith("running_var")]
    lost = buffers[0] if buffers else next(n for n in load_file(folder / WEIGHTS) if n.endswith("dense.bias"))
    load(folder, kind)
    change(folder, lambda state: {name: value for name, value in state.items() if name != lost})
    refusal(folder, "1 of its ", "missing (", lost.rsplit(".", 1)[1], kind=kind)


@pytest.mark.parametrize("model_type, name", [("dinov2", "mask_token"), ("resnet", "num_batches_tracked")])
def test_weights_that_have_no_effect_may_be_missing(tmp_path, capsys, model_type, name):
    folder = saved(tmp_path, VISION[model_type])
    load(folder)
    change(folder, lambda state: {n: v for n, v in state.items() if not n.endswith(name)})
    load(folder)
    assert capsys.readouterr().err.count("none missing") == 2


def test_one_half_of_clip_needs_only_its_own_weights(tmp_path):
    half = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = CLIPConfig(
        text_config={**half, "vocab_size": 50}, vision_config={**half, "image_size": 48, "patch_size": 8}
    )
    CLIPModel(config).save_pretrained(tmp_path)
    change(tmp_path, lambda state: {n: v for n, v in state.items() if not n.startswith("text_model.")})
    load(tmp_path)
    refusal(tmp_path, "missing (", kind="text")


def test_weights_of_other_shapes_are_named(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    refusal(copied, "6 have another shape (layers.0.mlp.fc1.bias [64] instead of [128]")


@pytest.mark.parametrize(
    "content, word",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 34\n", "git lfs pull"),
        (b"", "eader"),
        (b"\x10\0\0\0\0\0\0\0{not json       }", "eader"),
    ],
)
def test_damaged_weights_are_one_line(copied, content, word):
    (copied / WEIGHTS).write_bytes(content)
    refusal(copied, "weights cannot be read", word)


def test_cut_weights_and_none_are_one_line(copied):
    whole = (copied / WEIGHTS).read_bytes()
    (copied / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    refusal(copied, "weights cannot be read")
    (copied / WEIGHTS).unlink()
    refusal(copied, "weights cannot be read", "safetensors")


def test_pointers_in_place_of_any_file_are_named(copied, tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\n"
    (copied / "model_best.pth").write_text(pointer)
    with pytest.raises(ValueError, match=r"model_best.pth is a git-lfs pointer"):
        read_checkpoint(copied / "model_best.pth")
    (copied / "config.json").write_text(pointer)
    refusal(copied, "config.json is a git-lfs pointer")
    model = D2SModel(tiny_config(), build_word_tokenizer(["a dog"]))
    model.save_pretrained(tmp_path / "model")
    for file in ("model.safetensors", "tokenizer.json"):
        kept = (tmp_path / "model" / file).read_bytes()
        (tmp_path / "model" / file).write_text(pointer)
        with pytest.raises(ValueError, match=f"{file} is a git-lfs pointer.*git lfs pull"):
            D2SModel.from_pretrained(tmp_path / "model")
        (tmp_path / "model" / file).write_bytes(kept)


def test_only_the_table_of_weights_is_silenced(copied, monkeypatch, caplog):
    import logging

    logger = logging.getLogger("transformers.modeling_utils")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    plain = AutoModel.from_pretrained

    def loud(*args, **kwargs):
        logger.warning("a sign of something else")
        return plain(*args, **kwargs)

    monkeypatch.setattr(AutoModel, "from_pretrained", loud)
    change(copied, lambda state: {n: v for n, v in state.items() if not n.startswith("pooler.")})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(copied)
    assert {record.getMessage() for record in caplog.records} == {"a sign of something else"}
