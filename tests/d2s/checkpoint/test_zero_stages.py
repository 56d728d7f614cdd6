"""ZeRO 0 to 3 are one training: equal losses, and checkpoints that any stage and number of workers goes on from."""

import json
import re
from pathlib import Path

import forked
import pytest
import torch
from model_towers import small_vit
from small_set import make_model

from d2s.model import D2SModel, ModelConfig, TowerConfig, build_word_tokenizer, presets
from d2s.model.config import IdleSetting
from d2s.shards.cli import main as shard
from d2s.training.engine import EngineConfig, checkpoint_activations, engine_settings, idle_engine_settings

STAGES = (0, 1, 2, 3)
# The first test waits for all groups.
pytestmark = pytest.mark.timeout(900)
FP32 = ("--engine.precision", "fp32")


def stage(number: int, *more: str) -> list[str]:
    return [*FP32, "--engine.zero_stage", str(number), *more]


# What engine.offload_optimizer sets where there is a GPU.
OFFLOAD = {
    "zero_optimization": {"offload_optimizer": {"device": "cpu"}},
    "zero_force_ds_cpu_optimizer": False,
}


class Group:
    """Runs cases in one group of workers and remembers what they gave."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.results = folder, {}
        self.data = folder / "scenes"
        command = f"build --source scenes --count train=48,val=8,test=8 --size 32 --out {self.data}"
        assert shard(command.split()) == 0

    def case(self, name: str, overrides: list[str], *, source: str = "", **more: object) -> dict:
        where = {"from": str(self.folder / source)} if source else {}
        return {"run": str(self.folder / name), "overrides": overrides, "until": 4, **where, **more}

    def run(self, workers: int, cases: list[dict]) -> None:
        names = [self.folder / f"{what}.json" for what in ("cases", "out")]
        names[0].write_text(json.dumps({"data": str(self.data), "cases": cases}))
        names[1].unlink(missing_ok=True)
        done = forked.run("zero_workers:main", *names, workers=workers, timeout=800)
        assert done.returncode == 0, done.stderr[-4000:]
        self.results |= json.loads(names[1].read_text())


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Group:
    """One worker, then two, then one, then two again: each goes on from the checkpoints of the one before."""
    group = Group(tmp_path_factory.mktemp("zero"))
    case = group.case
    group.run(1, [case("one", stage(0), save=2, evaluate=True)])
    cases = []
    for number in STAGES:
        cases.append(case(f"two-{number}", stage(number), save=2, evaluate=True))
        cases.append(case(f"again-{number}", stage(number), source=f"two-{number}"))
        cases.append(case(f"one-two-{number}", stage(number), source="one"))
    for before, after in ((1, 3), (3, 1), (0, 2), (2, 0)):
        cases.append(case(f"stage-{before}-{after}", stage(after), source=f"two-{before}"))
    activations = "--engine.activation_checkpointing"
    cases += [case(f"activations-{number}", stage(number, activations, "True")) for number in (1, 3)]
    bf16 = ("--engine.precision", "bf16")
    cases += [case(f"bf16-{number}", [*stage(number), *bf16]) for number in (0, 1, 3)]
    cases.append(case("full", stage(1), save=2, full=1))
    offload = group.folder / "offload.json"
    offload.write_text(json.dumps(OFFLOAD))
    for number in (1, 2, 3):
        settings = stage(number, "--engine.deepspeed_json", str(offload))
        cases.append(case(f"offload-{number}", settings, save=2))
        cases.append(case(f"offload-again-{number}", settings, source=f"offload-{number}"))
    group.run(2, cases)
    moved = [
        case(f"two-one-{number}", stage(number), source=f"two-{number}", until=3, save=3) for number in STAGES
    ]
    group.run(1, moved)
    back = [case(f"two-one-two-{number}", stage(number), source=f"two-one-{number}") for number in STAGES]
    group.run(2, back)
    return group


def close(ours: list[float], theirs: list[float]) -> bool:
    return len(ours) == len(theirs) and ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.dist
@pytest.mark.parametrize("number", STAGES)
def test_two_workers_at_any_stage_lose_what_one_loses(group: Group, number: int) -> None:
    assert close(group.results[f"two-{number}"]["losses"], group.results["one"]["losses"])


@pytest.mark.dist
@pytest.mark.parametrize("number", STAGES)
def test_evaluation_is_the_same_and_training_goes_on(group: Group, number: int) -> None:
    ours, one = group.results[f"two-{number}"], group.results["one"]
    assert ours["rsum"] == pytest.approx(one["rsum"])
    assert close([ours["after"]], [one["after"]])


@pytest.mark.dist
@pytest.mark.parametrize("number", STAGES)
def test_resumed_alike_is_bit_equal(group: Group, number: int) -> None:
    whole, resumed = group.results[f"two-{number}"], group.results[f"again-{number}"]
    assert resumed["losses"] == whole["losses"][2:]
    assert resumed["weights"] == whole["weights"]


@pytest.mark.dist
@pytest.mark.parametrize("number", STAGES)
def test_checkpoints_move_between_numbers_of_workers_and_back(group: Group, number: int) -> None:
    losses = group.results["one"]["losses"]
    assert close(group.results[f"one-two-{number}"]["losses"], losses[2:])
    assert close(group.results[f"two-one-{number}"]["losses"], losses[2:3])
    assert close(group.results[f"two-one-two-{number}"]["losses"], losses[3:])


@pytest.mark.dist
@pytest.mark.parametrize("before, after", [(1, 3), (3, 1), (0, 2), (2, 0)])
def test_checkpoints_move_between_stages(group: Group, before: int, after: int) -> None:
    assert close(group.results[f"stage-{before}-{after}"]["losses"], group.results["one"]["losses"][2:])


@pytest.mark.dist
@pytest.mark.parametrize("number", [1, 3])
def test_computing_activations_again_changes_no_loss(group: Group, number: int) -> None:
    ours, plain = group.results[f"activations-{number}"], group.results[f"two-{number}"]
    assert close(ours["losses"], plain["losses"])


@pytest.mark.dist
@pytest.mark.parametrize("number", [1, 3])
def test_bf16_is_alike_at_every_stage(group: Group, number: int) -> None:
    ours, plain = group.results[f"bf16-{number}"]["losses"], group.results["bf16-0"]["losses"]
    # A last bit of a sum over workers decides how a number is rounded to bf16's 8 bits, from the second step on.
    assert ours[0] == pytest.approx(plain[0], rel=1e-5)
    assert ours == pytest.approx(plain, rel=2e-2)
    assert not close(ours, group.results[f"two-{number}"]["losses"]), "it was not bf16"


@pytest.mark.dist
def test_a_worker_whose_disk_is_full_stops_all_and_training_may_go_on(group: Group) -> None:
    full = group.results["full"]
    assert re.search(r"step-00000002 could not be written \(worker 1: .*File too large", full["refused"])
    assert close(full["losses"], group.results["two-1"]["losses"])


@pytest.mark.dist
@pytest.mark.parametrize("number", [1, 2, 3])
def test_offloading_the_optimizer_changes_no_loss(group: Group, number: int) -> None:
    ours, again = group.results[f"offload-{number}"], group.results[f"offload-again-{number}"]
    assert close(ours["losses"], group.results["one"]["losses"])
    assert again["losses"] == ours["losses"][2:]
    assert again["weights"] == ours["weights"]


def test_offload_without_zero_is_refused_and_without_a_gpu_told() -> None:
    with pytest.raises(ValueError, match=r"offload_optimizer is on with engine\.zero_stage 0"):
        EngineConfig(zero_stage=0, offload_optimizer=True)
    config = EngineConfig(zero_stage=2, offload_optimizer=True)
    settings = engine_settings(config, 4, 1.0)["zero_optimization"]
    if torch.cuda.is_available():
        assert settings["offload_optimizer"]["device"] == "cpu"
        assert not idle_engine_settings(config)
    else:
        assert "offload_optimizer" not in settings
        assert "no effect without a GPU" in idle_engine_settings(config)[0]


def test_towers_that_cannot_compute_again_are_told() -> None:
    with pytest.warns(IdleSetting, match="no effect on image_encoder: transformers cannot"):
        checkpoint_activations(make_model())


def test_computing_again_draws_the_same_dropout() -> None:
    text = TowerConfig(
        config={**presets.small_bert(16, 2).config, "hidden_dropout_prob": 0.3},
        pretrained=False, tokenizer="words",
    )  # fmt: skip
    image = TowerConfig(config={**small_vit(16, 2).config, "hidden_dropout_prob": 0.3}, pretrained=False)
    gradients = []
    for again in (False, True):
        torch.manual_seed(0)
        config = ModelConfig(width=8, image_size=32, image_encoder=image, text_encoder=text)
        model = D2SModel(config, build_word_tokenizer(["a b c"])).train()
        if again:
            checkpoint_activations(model)
        torch.manual_seed(1)
        pictures, ids = torch.randint(0, 255, (3, 3, 32, 32), dtype=torch.uint8), torch.tensor([[1, 2, 3]])
        loss = model.forward_image(pictures).sum()
        loss = loss + model.forward_text(ids, torch.ones_like(ids).bool()).embedding.square().sum()
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))
