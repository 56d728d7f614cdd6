"""A dry run's memory: that of d2s.plan, with the activations of real pairs, whatever the settings."""

import dataclasses

import pytest

from d2s.plan.dry_run import memory_parts
from d2s.shards.cli import main as shard
from d2s.train import main
from d2s.training.arguments import parse
from d2s.training.build import build_model, build_module
from d2s.training.checks import check_arguments
from d2s.training.engine import BUCKET
from d2s.training.run_spec import RunSpec

SMALL = (
    "--batch_size 8 --model.width 16 --data.image_size 32 --model.image_size 32 --data.loader_workers 0"
    " --model.text_mlp_norm layer"
).split()


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    out = tmp_path_factory.mktemp("dry") / "scenes"
    assert shard(f"build --source scenes --count train=16,val=8,test=8 --size 32 --out {out}".split()) == 0
    return ["scenes_small_pretrain", "--data", str(out), "--dry-run", *SMALL]


def _parts(prepared: RunSpec) -> dict[str, int]:
    return memory_parts(prepared, build_module(prepared, build_model(prepared)))


def _prepared(arguments: list[str], *more: str) -> RunSpec:
    # Two workers, of which a dry run needs none.
    return dataclasses.replace(check_arguments(*parse([*arguments, *more])), world=2)


@pytest.mark.filterwarnings("ignore:engine.offload_optimizer has no effect without a GPU")
def test_zero_offloading_and_buckets_count(arguments: list[str]) -> None:
    parts = [_parts(_prepared(arguments, "--engine.zero_stage", str(stage))) for stage in (0, 1, 3)]
    assert [part["buckets"] for part in parts[:2]] == [0, 4 * BUCKET]
    assert parts[2]["weights"] == pytest.approx(parts[0]["weights"] / 2, abs=8)
    assert parts[1]["optimizer"] > 0
    offloaded = _prepared(arguments, "--engine.zero_stage", "1", "--engine.offload_optimizer", "True")
    assert _parts(offloaded)["optimizer"] == 0


def test_an_online_teacher_counts(arguments: list[str]) -> None:
    prepared = _prepared(arguments)
    without = _parts(prepared)["weights"]
    module = build_module(prepared, build_model(prepared))
    loss = dataclasses.replace(prepared.config.loss, distill_weight=1.0, teacher="online")
    config = dataclasses.replace(prepared.config, stage="finetune", loss=loss)
    tower = 4 * sum(p.numel() for p in module.model.text_encoder.parameters())
    assert _parts(dataclasses.replace(prepared, config=config))["weights"] == without + tower


@pytest.mark.filterwarnings("ignore:engine.activation_checkpointing has no effect on image_encoder")
def test_activation_checkpointing_shrinks_the_printed_activations(
    arguments: list[str], capsys: pytest.CaptureFixture
) -> None:
    printed = []
    for more in ([], ["--engine.activation_checkpointing", "True"]):
        assert main([*arguments, "--batch_size", "16", *more]) == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if "activations " in line)
        printed.append(float(line.split()[1]))
    assert printed[1] < 0.9 * printed[0]
