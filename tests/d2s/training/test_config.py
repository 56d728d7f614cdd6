"""Recipes and overrides: every recipe is whole, and every mistake is one line."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from d2s.training.config import RENAMED, TrainConfig, differences, fields_of, override
from d2s.training.engine import EngineConfig, bucket_size, engine_settings, start_engine
from d2s.training.recipes import RECIPES, find_recipe
from d2s.workers import group as distributed
from d2s.workers.devices import share_cores


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_json(name: str) -> None:
    config = find_recipe(name)
    assert config.recipe == name
    again = TrainConfig.from_dict(json.loads(json.dumps(config.to_dict())))
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
        (["--optim.lr", "inf"], "^optim.lr is inf: it must be a finite number"),
        (["--optim.decay", "nan"], "optim.decay is nan"),
        (["--optim.milestones", "nan"], "optim.milestones is"),
        (["--loss.logit_bias", "nan"], "loss.logit_bias is nan"),
        (["--seed", "-1"], "seed is -1"),
        (["--loss.margin", "-1"], "loss.margin is -1"),
        (
            ["--model.image_encoder.layers", "0"],
            "^model.image_encoder.layers is 0: it must be greater than 0",
        ),
        (["--log.save_steps", "5"], "'log.save_steps' is called 'checkpoint.every_steps' now"),
        (["--loss.distill_weight", "0", "--loss.align_weight", "0"], "nothing would be learned"),
        (["--data.image_size", "96"], "data.image_size 96 and model.image_size 64 differ"),
    ],
)
def test_a_wrong_override_is_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        override(find_recipe("scenes_small_finetune"), arguments)
    assert "\n" not in str(caught.value)


def test_what_the_parser_says_of_overrides_that_it_accepts_is_not_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def cli(*_, default: TrainConfig, **__) -> TrainConfig:
        print("warning: something", file=sys.stderr)
        return default

    monkeypatch.setattr("d2s.training.config.tyro.cli", cli)
    override(find_recipe("scenes_small_finetune"), [])
    assert capsys.readouterr().err == "warning: something\n"


def test_old_names_of_fields_are_still_read() -> None:
    config = find_recipe("scenes_small_pretrain")
    saved = config.to_dict()
    for number, (old, new) in enumerate(RENAMED.items(), start=2):
        (old_part, old_field), (new_part, new_field) = old.split("."), new.split(".")
        del saved[new_part][new_field]
        saved[old_part][old_field] = number
    del saved["checkpoint"], saved["validation"]
    found = fields_of(TrainConfig.from_dict(saved))
    assert [found[new] for new in RENAMED.values()] == [2, 3, 4, 5, 6]
    assert "keep" in saved["log"]  # what was given stays as it was
    for wrong, message in (
        ({"optim": {"lrr": 1}}, "optim.lrr is 1: there is no such field; did you mean 'lr'"),
        ({"optim": {"lr": "1"}}, "optim.lr is '1': it must be a valid number"),
        ({"batch_size": True}, "batch_size is True: it must be a valid integer"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            TrainConfig.from_dict(saved | wrong)
        assert "\n" not in str(caught.value)


def test_an_unknown_recipe_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'scenes_small_pretrain'"):
        find_recipe("scenes_small_pretrian")


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"gradient_accumulation_steps": 32}', "gradient_accumulation_steps to 32: set engine.micro_batch"),
        ('{"train_batch_size": 8}', "train_batch_size to 8: set batch_size"),
        ('{"train_micro_batch_size_per_gpu": "auto"}', "set batch_size"),
        ('{"gradient_clipping": 2}', "set optim.grad_clip"),
        ('{"optimizer": {"type": "Lamb"}}', "set the fields of optim"),
        ('{"scheduler": {"type": "WarmupLR"}}', "set the fields of optim"),
        ('{"fp16": {"enabled": true}}', "set engine.precision"),
        ('{"bf16": {"enabled": true}}', "set engine.precision"),
        ('{"zero_optimization": 2}', "zero_optimization is 2, not an object: set engine.zero_stage"),
        ('{"zero_optimization": {"stage": 2}}', "zero_optimization.stage to 2: set engine.zero_stage"),
        ('{"zero_optimization": {"reduce_bucket_size": "auto"}}', 'reduce_bucket_size is "auto"'),
        ("[1]", "not a JSON object"),
        ("{", "give a file that holds a JSON object"),
    ],
)
def test_a_deepspeed_json_sets_nothing_that_a_field_does(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        engine_settings(EngineConfig(deepspeed_json=str(path)), 4, 1.0)
    said = str(caught.value)
    assert said.startswith(f"engine.deepspeed_json {path}")
    assert message in said
    assert "\n" not in said


def test_a_deepspeed_json_is_merged_into_the_settings(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"wall_clock_breakdown": true, "zero_optimization": {"reduce_bucket_size": 1e6}}')
    settings = engine_settings(EngineConfig(deepspeed_json=str(path), zero_stage=2), 4, 1.0)
    assert settings["wall_clock_breakdown"]
    assert settings["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1e6}
    assert settings["gradient_accumulation_steps"] == 1
    assert bucket_size(settings) == 1_000_000


def test_an_engine_that_no_checkpoint_keeps_is_refused_at_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed

    engine = SimpleNamespace(module=nn.Linear(1, 1), optimizer=object())
    monkeypatch.setattr(deepspeed, "initialize", lambda **_: (engine, None))
    with pytest.raises(ValueError, match="holds its state in a way that no checkpoint can keep"):
        start_engine(engine.module, None, {})


@pytest.mark.parametrize("text", ["abc", "0", "-1", "1.5", "", "99999"])
def test_a_wrong_number_of_threads_is_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D2S_THREADS", text)
    with pytest.raises(ValueError, match=f"D2S_THREADS is '{text}': give a number of threads"):
        share_cores()


@pytest.mark.parametrize("batch, workers, near", [(128, 3, "126 or 129"), (2, 3, "3"), (7, 4, "4 or 8")])
def test_a_batch_that_does_not_divide_names_the_nearest(batch: int, workers: int, near: str) -> None:
    assert distributed.local_batch(12, 3) == 4
    with pytest.raises(ValueError, match=rf"among {workers} workers: set it to {near}$"):
        distributed.local_batch(batch, workers)
