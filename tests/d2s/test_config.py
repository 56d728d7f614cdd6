"""Recipes and overrides: every recipe is whole, and every mistake is one line."""

import json

import pytest

from d2s.config import differences, fields_of, from_dict, override, to_dict
from d2s.prepare import find_recipe
from d2s.recipes import RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_json(name: str) -> None:
    config = find_recipe(name)
    assert config.recipe == name
    again = from_dict(json.loads(json.dumps(to_dict(config))))
    assert again == config
    assert config.stage == ("pretrain" if "pretrain" in name else "finetune")


def test_names_carry_the_true_input_size() -> None:
    for name in RECIPES:
        size = next((part for part in name.split("_") if part.isdigit()), None)
        if size:
            assert RECIPES[name]().data.image_size == int(size)


def test_compat_recipes_turn_every_switch_on() -> None:
    config = RECIPES["f30k_vitb16_384_finetune_compat"]()
    switches = [name for name in fields_of(config) if "compat" in name]
    assert switches
    assert all(fields_of(config)[name] for name in switches)
    assert config.model.decoder.layout == "postfix"
    ours = RECIPES["f30k_vitb16_384_finetune"]()
    assert not any(fields_of(ours)[name] for name in switches)


def test_overrides_reach_nested_fields() -> None:
    config = find_recipe("scenes_small_finetune")
    changed = override(
        config,
        ["--optim.lr", "3e-4", "--loss.distill=l2", "--batch_size", "64", "--model.decoder.tokens", "8"],
    )
    assert (changed.optim.lr, changed.loss.distill, changed.batch_size) == (3e-4, "l2", 64)
    assert changed.model.decoder.tokens == 8
    assert set(differences(config, changed)) == {
        "optim.lr", "loss.distill", "batch_size", "model.decoder.tokens",
    }  # fmt: skip


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--optim.lrr", "1"], "no field 'optim.lrr'; did you mean 'optim.lr'"),
        (["--optim.lr", "fast"], "--optim.lr.*'fast'"),
        (["--optim.schedule", "linear"], "invalid choice 'linear'.*optim.schedule"),
        (["--batch_size", "0"], "batch_size is 0"),
        (["--optim.lr", "inf"], "optim.lr is inf"),
        (["--optim.decay", "nan"], "optim.decay is nan"),
        (["--optim.milestones", "nan"], "optim.milestones is"),
        (["--loss.logit_bias", "nan"], "loss.logit_bias is nan"),
        (["--seed", "-1"], "seed is -1"),
        (["--loss.margin", "-1"], "loss.margin is -1"),
        (["--loss.distill_weight", "0", "--loss.align_weight", "0"], "nothing would be learned"),
        (["--data.image_size", "96"], "data.image_size 96 and model.image_size 64 differ"),
    ],
)
def test_a_wrong_override_is_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        override(find_recipe("scenes_small_finetune"), arguments)
    assert "\n" not in str(caught.value)


def test_an_unknown_recipe_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'scenes_small_pretrain'"):
        find_recipe("scenes_small_pretrian")
