"""The importer of the authors' checkpoints, on files made here in their layout."""

import argparse
import collections
import os
import pickle

import pytest
import torch
from model_towers import CAPTIONS, pictures, pieces
from torch import nn

from d2s.compat import main
from d2s.model import D2SModel, build_word_tokenizer
from d2s.model.release_importer import convert

WIDTH, HIDDEN, SIZE = 16, 64, 32


def norm(state, name, width):
    state[f"{name}.weight"], state[f"{name}.bias"] = 1 + torch.randn(width) / 9, torch.randn(width) / 9


def linear(state, name, out, given):
    state[f"{name}.weight"], state[f"{name}.bias"] = (
        torch.randn(out, given) / given**0.5,
        torch.randn(out) / 9,
    )


def pool(state, at):
    gru = nn.GRU(32, 32, bidirectional=True)
    state.update({f"{at}.gru.{name}": value.detach() for name, value in gru.named_parameters()})
    state[f"{at}.linear.weight"] = torch.randn(1, 32)


def transformer_block(state, at, inner):
    """One layer of a ViT or BERT as transformers 4 spells it."""
    for name in ("query", "key", "value"):
        linear(state, f"{at}.attention.{inner}.{name}", HIDDEN, HIDDEN)
    linear(state, f"{at}.attention.output.dense", HIDDEN, HIDDEN)
    linear(state, f"{at}.intermediate.dense", 2 * HIDDEN, HIDDEN)
    linear(state, f"{at}.output.dense", HIDDEN, 2 * HIDDEN)


def vit(state, at, grid):
    state[f"{at}.embeddings.cls_token"] = torch.randn(1, 1, HIDDEN)
    state[f"{at}.embeddings.position_embeddings"] = torch.randn(1, 1 + grid**2, HIDDEN)
    state[f"{at}.embeddings.patch_embeddings.projection.weight"] = torch.randn(HIDDEN, 3, 8, 8) / 9
    state[f"{at}.embeddings.patch_embeddings.projection.bias"] = torch.randn(HIDDEN)
    for layer in range(2):
        block = f"{at}.encoder.layer.{layer}"
        transformer_block(state, block, "attention")
        norm(state, f"{block}.layernorm_before", HIDDEN)
        norm(state, f"{block}.layernorm_after", HIDDEN)
    norm(state, f"{at}.layernorm", HIDDEN)
    linear(state, f"{at}.pooler.dense", HIDDEN, HIDDEN)
    return HIDDEN


def swin(state, at, grid):
    state[f"{at}.embeddings.patch_embeddings.projection.weight"] = torch.randn(8, 3, 4, 4)
    state[f"{at}.embeddings.patch_embeddings.projection.bias"] = torch.randn(8)
    norm(state, f"{at}.embeddings.norm", 8)
    for stage, (depth, heads) in enumerate([(2, 1), (1, 2)]):
        width = 8 * 2**stage
        for number in range(depth):
            block = f"{at}.encoder.layers.{stage}.blocks.{number}"
            for name in ("query", "key", "value"):
                linear(state, f"{block}.attention.self.{name}", width, width)
            state[f"{block}.attention.self.relative_position_bias_table"] = torch.randn(49, heads)
            state[f"{block}.attention.self.relative_position_index"] = torch.zeros(16, 16, dtype=torch.int64)
            linear(state, f"{block}.attention.output.dense", width, width)
            linear(state, f"{block}.intermediate.dense", 4 * width, width)
            linear(state, f"{block}.output.dense", width, 4 * width)
            norm(state, f"{block}.layernorm_before", width)
            norm(state, f"{block}.layernorm_after", width)
    state[f"{at}.encoder.layers.0.downsample.reduction.weight"] = torch.randn(16, 32) / 6
    norm(state, f"{at}.encoder.layers.0.downsample.norm", 32)
    norm(state, f"{at}.layernorm", 16)
    return 16


def text_tower(state, at, words):
    state[f"{at}.bert.embeddings.word_embeddings.weight"] = torch.randn(words, HIDDEN)
    state[f"{at}.bert.embeddings.position_embeddings.weight"] = torch.randn(64, HIDDEN)
    state[f"{at}.bert.embeddings.token_type_embeddings.weight"] = torch.randn(2, HIDDEN)
    state[f"{at}.bert.embeddings.position_ids"] = torch.arange(64)[None]
    norm(state, f"{at}.bert.embeddings.LayerNorm", HIDDEN)
    for layer in range(2):
        block = f"{at}.bert.encoder.layer.{layer}"
        transformer_block(state, block, "self")
        norm(state, f"{block}.attention.output.LayerNorm", HIDDEN)
        norm(state, f"{block}.output.LayerNorm", HIDDEN)
    linear(state, f"{at}.bert.pooler.dense", HIDDEN, HIDDEN)
    linear(state, f"{at}.fc", WIDTH, HIDDEN)
    norm(state, f"{at}.ln", WIDTH)
    linear(state, f"{at}.mlp.layers.0", WIDTH // 2, HIDDEN)
    linear(state, f"{at}.mlp.layers.1", WIDTH, WIDTH // 2)
    for number, width in enumerate((WIDTH // 2, WIDTH)):
        norm(state, f"{at}.mlp.bns.{number}", width)
        state[f"{at}.mlp.bns.{number}.running_mean"] = torch.randn(width)
        state[f"{at}.mlp.bns.{number}.running_var"] = torch.rand(width) + 0.5
        state[f"{at}.mlp.bns.{number}.num_batches_tracked"] = torch.tensor(7)
    pool(state, f"{at}.gpool")


def prompt_learner(state):
    at = "prompt_learner"
    state[f"{at}.prompt_tokens"] = torch.randn(5, WIDTH)
    state[f"{at}.mask_token"] = torch.zeros(5, WIDTH)
    for number in range(2):
        block = f"{at}.decoder_blocks.{number}"
        norm(state, f"{block}.norm1", WIDTH)
        norm(state, f"{block}.norm2", WIDTH)
        linear(state, f"{block}.attn.qkv", 3 * WIDTH, WIDTH)
        linear(state, f"{block}.attn.proj", WIDTH, WIDTH)
        linear(state, f"{block}.mlp.fc1", 4 * WIDTH, WIDTH)
        linear(state, f"{block}.mlp.fc2", WIDTH, 4 * WIDTH)
    norm(state, f"{at}.decoder_norm", WIDTH)


def release_checkpoint(words, *, vision=vit, stage=2, grid=4, prefix="module."):
    """A checkpoint in the release's layout, with small random weights."""
    torch.manual_seed(0)
    state = collections.OrderedDict()
    hidden = vision(state, "img_enc.visual_encoder", grid)
    linear(state, "img_enc.image_encoder.fc", WIDTH, hidden)
    pool(state, "img_enc.image_encoder.gpool")
    text_tower(state, "txt_enc", words)
    if stage == 2:
        text_tower(state, "long_txt_enc", words)
        prompt_learner(state)
    state = collections.OrderedDict((prefix + name, value) for name, value in state.items())
    opt = argparse.Namespace(img_res=SIZE, lr_schedules=[9, 15], margin=0.2, vit_type="vit")
    return {"model": state, "opt": opt, "epoch": 3, "best_rsum": 1.5, "Eiters": 9}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    built = build_word_tokenizer(CAPTIONS, min_count=1)
    built.save_pretrained(folder)
    return str(folder), len(built)


def release_prompt(state, words):
    """The release's decoder on word features (B, L, D) of a padded batch: no mask, tokens after the words."""
    at = "prompt_learner."
    x = torch.cat([words, state[at + "prompt_tokens"].expand(len(words), -1, -1)], dim=1)

    def normed(x, name):
        return nn.functional.layer_norm(x, (WIDTH,), state[name + ".weight"], state[name + ".bias"])

    def mapped(x, name):
        return nn.functional.linear(x, state[name + ".weight"], state[name + ".bias"])

    for number in range(2):
        block = f"{at}decoder_blocks.{number}."
        q, k, v = mapped(normed(x, block + "norm1"), block + "attn.qkv").chunk(3, dim=-1)
        heads = [part.unflatten(-1, (4, WIDTH // 4)).transpose(1, 2) for part in (q, k, v)]
        attended = torch.softmax(heads[0] @ heads[1].mT / (WIDTH // 4) ** 0.5, dim=-1) @ heads[2]
        x = x + mapped(attended.transpose(1, 2).flatten(2), block + "attn.proj")
        inner = nn.functional.gelu(mapped(normed(x, block + "norm2"), block + "mlp.fc1"))
        x = x + mapped(inner, block + "mlp.fc2")
    return normed(x, at + "decoder_norm")[:, -5:].mean(1)


@torch.no_grad()
def test_text_side_gives_what_the_release_evaluates(tokenizer, tmp_path):
    name, words = tokenizer
    content = release_checkpoint(words)
    torch.save(content, tmp_path / "model_best.pth")
    model = convert(tmp_path / "model_best.pth", tokenizer=name)
    state = {name.removeprefix("module."): value for name, value in content["model"].items()}
    ids, mask = pieces(model, CAPTIONS)
    hidden = model.text_encoder.tower(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    inner = nn.functional.linear(hidden, *(state[f"txt_enc.mlp.layers.0.{n}"] for n in ("weight", "bias")))
    bns = [state[f"txt_enc.mlp.bns.0.{n}"] for n in ("running_mean", "running_var", "weight", "bias")]
    inner = torch.relu(nn.functional.batch_norm(inner.flatten(0, 1), *bns)).view_as(inner)
    features = nn.functional.linear(inner, *(state[f"txt_enc.mlp.layers.1.{n}"] for n in ("weight", "bias")))
    features += nn.functional.linear(hidden, *(state[f"txt_enc.fc.{n}"] for n in ("weight", "bias")))
    out = model.forward_text(ids, mask)
    prompt = release_prompt(state, features)
    torch.testing.assert_close(out.prompt, prompt, atol=1e-5, rtol=0)
    expected = out.text + prompt / (prompt.norm(dim=1, keepdim=True) + 1e-8)
    torch.testing.assert_close(out.embedding, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("vision", [vit, swin])
@pytest.mark.parametrize("stage", [1, 2])
def test_every_weight_arrives(vision, stage, tokenizer, tmp_path):
    name, words = tokenizer
    content = release_checkpoint(words, vision=vision, stage=stage, prefix="" if stage == 1 else "module.")
    torch.save(content, tmp_path / "c.pth")
    model = convert(tmp_path / "c.pth", tokenizer=name)
    arrived = {tuple(value.flatten()[:50].tolist()) for value in model.state_dict().values()}
    unused = (
        "pooler",
        "bns.1",
        "mask_token",
        "long_txt_enc",
        "position_i",
        "relative_position_index",
        "tracked",
    )
    for name, value in content["model"].items():
        if not any(part in name for part in unused):
            assert tuple(value.flatten()[:50].tolist()) in arrived, name
    assert (model.decoder is None) == (stage == 1)
    assert model.encode_text(["a dog"]).shape == (1, WIDTH)
    assert model.forward_image(pictures(2, SIZE)).shape == (2, WIDTH)


def test_command_writes_a_model_with_the_switches_on(tokenizer, tmp_path, capsys):
    name, words = tokenizer
    # The release feeds 384 pixels to a tower of 224: the table is smaller than the input's grid.
    torch.save(release_checkpoint(words, grid=2), tmp_path / "c.pth")
    out = tmp_path / "out"
    assert main([str(tmp_path / "c.pth"), "--out", str(out), "--tokenizer", name]) == 0
    model = D2SModel.from_pretrained(out)
    config = model.config
    assert (config.compat_decoder_padding, config.compat_unit_prompt, config.compat_batch_norm) == (True,) * 3
    assert config.decoder.layout == "postfix"
    assert config.image_size == SIZE
    assert model.image_encoder.tower.embeddings.position_embeddings.shape[1] == 17
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.pth", "out"]
    assert main([str(tmp_path / "c.pth"), "--out", str(out), "--tokenizer", name]) == 2
    assert "--out" in capsys.readouterr().err
    ours = convert(tmp_path / "c.pth", tokenizer=name, ours=True).config
    assert not ours.compat_unit_prompt


class Malicious:
    """Unpickled without care, this leaves a file behind."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("writer", ["zip", "legacy", "pickle"])
def test_a_malicious_pickle_is_refused(writer, tmp_path, capsys):
    trap, path = tmp_path / "trap", tmp_path / "c.pth"
    content = {"model": {"w": torch.zeros(1)}, "opt": Malicious(trap)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content["opt"], protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "zip")
    assert main([str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "refused" in error
    assert "mkdir" in error
    assert not trap.exists()
    assert not (tmp_path / "out").exists()
    # The trap works where it is not refused.
    torch.load(path, weights_only=False) if writer != "pickle" else pickle.loads(path.read_bytes())
    assert trap.exists()


def test_wrong_files_are_named_in_one_line(tokenizer, tmp_path):
    name, words = tokenizer
    good = release_checkpoint(words)
    wrong = {
        "has no dictionary 'model'": {"weights": {}},
        "img_res|--image-size": {**good, "opt": argparse.Namespace()},
        "'module.more'": {**good, "model": {**good["model"], "module.more": torch.zeros(1)}},
        "no weight|has no": {**good, "model": {k: v for k, v in good["model"].items() if "fc.bias" not in k}},
        "not a named tensor": {**good, "model": {"a": 3}},
    }
    for words_in_error, content in wrong.items():
        torch.save(content, tmp_path / "c.pth")
        with pytest.raises(ValueError, match=words_in_error) as caught:
            convert(tmp_path / "c.pth", tokenizer=name)
        assert "\n" not in str(caught.value)
    torch.save(good, tmp_path / "c.pth")
    data = (tmp_path / "c.pth").read_bytes()
    (tmp_path / "c.pth").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"damaged|refused"):
        convert(tmp_path / "c.pth", tokenizer=name)
    with pytest.raises(ValueError, match="no such file"):
        convert(tmp_path / "none.pth", tokenizer=name)


@pytest.mark.parametrize(
    "name, change",
    [
        ("img_enc.image_encoder.fc.weight", lambda w: w.sum()),
        ("img_enc.image_encoder.gpool.linear.weight", lambda w: w.flatten()),
        ("img_enc.visual_encoder.embeddings.position_embeddings", lambda w: w[0, :, 0]),
        ("img_enc.visual_encoder.embeddings.position_embeddings", lambda w: w[..., :-1]),
        ("img_enc.visual_encoder.embeddings.patch_embeddings.projection.weight", lambda w: w[:0]),
        ("txt_enc.bert.embeddings.word_embeddings.weight", lambda w: w[0]),
        ("prompt_learner.prompt_tokens", lambda w: w[0, 0]),
        ("prompt_learner.decoder_blocks.0.mlp.fc1.weight", lambda w: w[0]),
        ("txt_enc.fc.weight", lambda w: w.to_sparse()),
    ],
)
def test_weights_of_a_wrong_shape_are_named_in_one_line(tokenizer, tmp_path, capsys, name, change):
    folder, words = tokenizer
    content = release_checkpoint(words)
    content["model"]["module." + name] = change(content["model"]["module." + name]).clone()
    torch.save(content, tmp_path / "c.pth")
    assert main([str(tmp_path / "c.pth"), "--out", str(tmp_path / "out"), "--tokenizer", folder]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "shape" in error or "plain tensor" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["prompt_learner.prompt_tokens", "prompt_learner.decoder_norm.weight"])
def test_half_a_decoder_is_refused(tokenizer, tmp_path, name):
    folder, words = tokenizer
    content = release_checkpoint(words)
    del content["model"]["module." + name]
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(ValueError, match=r"has no( weight 'decoder.tokens'| decoder.norm.weight)"):
        convert(tmp_path / "c.pth", tokenizer=folder)


def test_a_usage_error_and_a_place_that_cannot_be_are_one_line(tokenizer, tmp_path, capsys):
    for arguments in ([], ["c.pth"], ["c.pth", "--out", "o", "--image-size", "0"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
    folder, words = tokenizer
    torch.save(release_checkpoint(words, stage=1), tmp_path / "c.pth")
    (tmp_path / "file").write_text("")
    given = [str(tmp_path / "c.pth"), "--out", str(tmp_path / "file" / "out"), "--tokenizer", folder]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(tmp_path / "file") in error
