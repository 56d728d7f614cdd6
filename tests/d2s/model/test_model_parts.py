"""Text encoder, decoder, frozen towers, teacher, and the parts of the model together."""

import warnings

import pytest
import torch
from model_towers import BERT, CAPTIONS, VISION, pictures, pieces, tiny_config, tiny_model
from torch import nn

from d2s.model import D2SModel, DecoderConfig, IdleSetting, Teacher, TowerConfig
from d2s.model.config import idle_settings


def without_dropout(model: D2SModel) -> D2SModel:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("vision", VISION)
def test_every_parameter_that_learns_gets_a_gradient(vision):
    model = tiny_model(vision).train()
    image, text = model(pictures(3), *pieces(model, CAPTIONS[:3]), torch.arange(3))
    (image.sum() + (text.embedding * torch.arange(16.0)).sum()).backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in trained.items():
        assert parameter.ndim >= 1, name
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    towers = [parameter for name, parameter in trained.items() if ".tower." in name]
    assert [*map(id, model.tower_parameters())] == [*map(id, towers)]


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_training_leaves_padding_out(norm):
    model = without_dropout(tiny_model(text_mlp_norm=norm)).double().train()
    short = model.forward_text(*pieces(model, CAPTIONS)).embedding
    statistics = {name: value.clone() for name, value in model.named_buffers() if "running" in name}
    model = without_dropout(tiny_model(text_mlp_norm=norm)).double().train()
    padded = model.forward_text(*pieces(model, CAPTIONS, 50)).embedding
    torch.testing.assert_close(short, padded, atol=1e-11, rtol=0)
    for name, value in model.named_buffers():
        if "running" in name:
            torch.testing.assert_close(value, statistics[name], atol=1e-12, rtol=0)


def test_batch_norm_of_the_release_counts_padding():
    model = without_dropout(tiny_model(compat_batch_norm=True)).double().train()
    short = model.forward_text(*pieces(model, CAPTIONS)).text
    padded = model.forward_text(*pieces(model, CAPTIONS, 50)).text
    assert (short - padded).abs().max() > 1e-3
    assert not model.text_encoder.mlp.norm.across_workers


@torch.no_grad()
def test_text_embedding_is_text_plus_prompt():
    model = tiny_model()
    ids, mask = pieces(model, CAPTIONS)
    out = model.forward_text(ids, mask)
    torch.testing.assert_close(out.embedding, out.text + out.prompt)
    encoded = model.encode_text(CAPTIONS)
    torch.testing.assert_close(encoded, nn.functional.normalize(out.embedding, dim=1), atol=1e-6, rtol=0)
    model.decoder = None
    plain = model.forward_text(ids, mask)
    assert plain.prompt is None
    torch.testing.assert_close(plain.embedding, out.text)


@torch.no_grad()
def test_release_scales_the_prompt_in_evaluation_only():
    model = without_dropout(tiny_model(compat_unit_prompt=True))
    batch = pieces(model, CAPTIONS)
    out = model.forward_text(*batch)
    unit = nn.functional.normalize(out.prompt, dim=1)
    torch.testing.assert_close(out.embedding, out.text + unit, atol=1e-6, rtol=0)
    out = model.train().forward_text(*batch)
    torch.testing.assert_close(out.embedding, out.text + out.prompt)


@pytest.mark.filterwarnings("ignore::d2s.model.IdleSetting")
@torch.no_grad()
def test_place_of_the_mask_tokens_changes_rounding_only():
    prompts = []
    for layout in ("surround", "prefix", "postfix"):
        model = tiny_model(decoder=DecoderConfig(tokens=5, depth=2, heads=2, layout=layout)).double()
        prompts.append(model.forward_text(*pieces(model, CAPTIONS)).prompt)
    for other in prompts[1:]:
        torch.testing.assert_close(other, prompts[0], atol=1e-12, rtol=0)


@torch.no_grad()
def test_decoder_reads_the_words():
    model = tiny_model()
    ids, mask = pieces(model, CAPTIONS)
    words = torch.randn(*ids.shape, 16)
    changed = words.clone()
    changed[1, int(mask[1].sum()) - 1] = torch.randn(16)
    moved = (model.decoder(words, mask) - model.decoder(changed, mask)).abs().amax(1)
    assert moved[1] > 1e-3
    assert moved[[0, 2, 3]].max() < 1e-6


@pytest.mark.filterwarnings("ignore::d2s.model.IdleSetting")
def test_frozen_towers_stay_as_they_are():
    model = tiny_model(
        image_encoder=TowerConfig(config=VISION["resnet"], pretrained=False, freeze=True),
        text_encoder=TowerConfig(config=BERT, pretrained=False, tokenizer="words", freeze=True),
    ).train()
    assert model.training
    assert model.text_encoder.dropout.training
    assert not model.image_encoder.tower.training
    assert not model.text_encoder.tower.training
    before = {name: value.clone() for name, value in model.state_dict().items() if ".tower." in name}
    image, text = model(pictures(3), *pieces(model, CAPTIONS[:3]))
    (image.sum() + text.embedding.square().sum()).backward()
    assert model.tower_parameters() == []
    assert all(p.grad is None for n, p in model.named_parameters() if ".tower." in n)
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_teacher_is_a_frozen_copy_in_eval_mode():
    model = tiny_model().train()
    teacher = Teacher(model.text_encoder)
    ids, mask = pieces(model, CAPTIONS)
    first = teacher.train()(ids, mask)
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not first.requires_grad
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert torch.equal(teacher(ids, mask), first)
    torch.testing.assert_close(first, tiny_model().forward_text(ids, mask).text)
    assert Teacher(model.text_encoder, train_mode=True).training


def test_layers_cut_the_tower():
    model = tiny_model(text_encoder=TowerConfig(config=BERT, pretrained=False, tokenizer="words", layers=1))
    assert model.text_encoder.tower.config.num_hidden_layers == 1
    with pytest.raises(ValueError, match="2 layers"):
        tiny_model(text_encoder=TowerConfig(config=BERT, pretrained=False, tokenizer="words", layers=3))


def test_bfloat16_autocast_and_weights():
    model = tiny_model().train()
    batch = (pictures(3), *pieces(model, CAPTIONS[:3]), torch.arange(3))
    with torch.autocast("cpu", torch.bfloat16):
        image, text = model(*batch)
    (image.float().sum() + text.embedding.float().sum()).backward()
    exact = tiny_model()
    close = nn.functional.cosine_similarity(
        exact.forward_image(batch[0]), tiny_model().bfloat16()(*batch)[0].float()
    )
    assert close.min() > 0.99


def test_tokenizer_must_fit_the_tower():
    config = tiny_config(
        text_encoder=TowerConfig(config={**BERT, "vocab_size": 7}, pretrained=False, tokenizer="words")
    )
    with pytest.raises(ValueError, match="hand D2SModel a tokenizer"):
        D2SModel(config)
    # Random weights take the tokenizer's size.
    model = tiny_model(text_encoder=config.text_encoder)
    assert model.text_encoder.tower.config.vocab_size == len(model.tokenizer)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_encoder": TowerConfig(config=VISION["resnet"])}, "image_encoder.pretrained=True has no effect"),
        ({"text_encoder": TowerConfig(config=BERT, pretrained=False, freeze=True, tokenizer="words")},
         "text_encoder.freeze=True keeps a tower with random weights"),
        ({"decoder": DecoderConfig(tokens=5, depth=1, heads=2, layout="prefix")}, "layout='prefix' has no effect"),
    ],
)  # fmt: skip
def test_settings_without_effect_warn(changes, words, tmp_path):
    with pytest.warns(IdleSetting, match=words) as caught:
        model = tiny_model("resnet", **changes)
    assert len(caught) == 1
    model.save_pretrained(tmp_path)
    # What is loaded has its weights.
    with warnings.catch_warnings():
        warnings.simplefilter("error", IdleSetting)
        D2SModel.from_pretrained(tmp_path)
        tiny_model("resnet")


def test_a_new_decoder_of_a_saved_model_warns_too(tmp_path):
    tiny_model("resnet", decoder=None).save_pretrained(tmp_path)
    with pytest.warns(IdleSetting, match="layout='postfix' has no effect"):
        D2SModel.from_pretrained(
            tmp_path, decoder=DecoderConfig(tokens=5, depth=1, heads=2, layout="postfix")
        )


def test_no_recipe_has_an_idle_setting():
    from d2s.training.recipes import RECIPES

    for name, build in RECIPES.items():
        assert idle_settings(build().model) == [], name
