"""The plan of a training: its sums, its limits, and what a few real steps take beside it."""

import dataclasses
import re

import pytest

from d2s.plan import command as plan
from d2s.plan.memory import PARTS, largest_batch, memory
from d2s.plan.sizes import Sizes, build, measure_sizes
from d2s.plan.traffic import traffic
from d2s.training.recipes import RECIPES

GIB = 2**30
SIZES = Sizes(parameters=1000, learned=800, teacher=100, saved=64, saved_per_pair=10)


@pytest.fixture(scope="module")
def small() -> object:
    return RECIPES["scenes_small_pretrain"]()


def test_parts_by_hand(small: object) -> None:
    parts = [memory(small, SIZES, 4, stage, 16, bucket=7) for stage in range(4)]
    assert all(tuple(part) == PARTS for part in parts)
    # Frozen weights are divided by ZeRO 3 as well; the online teacher's 100 are not.
    assert [part["weights"] for part in parts] == [4400, 4400, 4400, 400 + 1000]
    assert [part["gradients"] for part in parts] == [3200, 3200, 800, 800]
    assert [part["optimizer"] for part in parts] == [6400, 2400, 2400, 2400]
    assert [part["buckets"] for part in parts] == [0, 28, 28, 28 + 4000]
    assert {part["activations"] for part in parts} == {64 + 4 * 10}
    assert {part["gathered"] for part in parts} == {4 * 4 * small.model.width * 16}
    assert memory(small, SIZES, 1, 0, 16, 7)["gathered"] == 0


def test_traffic_by_hand(small: object) -> None:
    sent = [traffic(small, SIZES, 4, stage, 16) for stage in range(4)]
    assert [part["gradients"] for part in sent] == [4800, 2400, 2400, 2400]
    # ZeRO 3 gathers 1000 weights for the forward pass, and the 800 learned ones for the backward.
    assert [part["weights"] for part in sent] == [0, 2400, 2400, 3000 + 2400]
    assert {part["embeddings"] for part in sent} == {2 * 4 * small.model.width * 16 * 3 // 4}
    assert sum(traffic(small, SIZES, 1, 0, 16).values()) == 0


def test_traffic_by_micro_batches(small: object) -> None:
    # 4 pairs a worker in pieces of 3: two passes, embedded twice.
    pieces = dataclasses.replace(small, engine=dataclasses.replace(small.engine, micro_batch=3))
    sent = [traffic(pieces, SIZES, 4, stage, 16) for stage in range(4)]
    assert [part["gradients"] for part in sent] == [4800, 2400, 4800, 4800]
    assert [part["weights"] for part in sent] == [0, 2400, 2400, 4 * 3000 + 2 * 2400]


# In units of what a worker sends of one side; `home` is a hop more: a third of that with 4 workers.
@pytest.mark.parametrize(
    "exchange, fields, there, back",
    [
        ("gather", {"align": "infonce"}, 2, 2),
        ("ring", {"align": "infonce"}, 2, 2 * (2 + 1 / 3)),
        ("gather", {"align": "sigmoid"}, 2, 1),
        ("ring", {"align": "sigmoid"}, 1, 2 + 1 / 3),
        ("gather", {"align_weight": 0.0, "distill_weight": 1.0, "distill": "relational"}, 2, 1),
        ("ring", {"align_weight": 0.0, "distill_weight": 1.0, "distill": "relational"}, 2, 3 + 1 / 3),
        ("ring", {"align": "infonce", "distill_weight": 1.0, "distill": "cosine"}, 2, 2 * (2 + 1 / 3)),
    ],
)
def test_embeddings_on_their_way(
    small: object, exchange: str, fields: dict, there: float, back: float
) -> None:
    sent = traffic(_with_loss(small, exchange=exchange, **fields), SIZES, 4, 1, 16)
    side = 3 * 4 * 4 * small.model.width
    assert sent["embeddings"] == pytest.approx(there * side)
    assert sent["their gradients"] == pytest.approx(back * side)


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_of_the_hardest_negatives_winners_alone_travel_back(small: object, exchange: str) -> None:
    sent = traffic(_with_loss(small, exchange=exchange, align="hinge"), SIZES, 4, 1, 16)
    assert sent["their gradients"] == 3 * 2 * 4 * (4 * small.model.width + 8) // 4


def _with_loss(config: object, **fields: object) -> object:
    loss = dataclasses.replace(config.loss, **fields)
    return dataclasses.replace(config, stage="finetune" if loss.distill_weight else config.stage, loss=loss)


def test_a_batch_norm_limits_the_batch_to_the_micro_batch(small: object) -> None:
    engine = dataclasses.replace(small.engine, micro_batch=64)
    config = dataclasses.replace(small, engine=engine)
    sizes = measure_sizes(config, words=100, local_batch=64)  # 65 of a worker's 64 pairs were refused once
    assert sizes.batch_norm
    assert largest_batch(config, sizes, 2, 1, 64 * GIB, bucket=1000) == 128
    with pytest.raises(ValueError, match="64 of a worker's 128 pairs"):
        measure_sizes(config, words=100, local_batch=128)


def test_settings_that_save_memory_do(small: object) -> None:
    def part(name: str, stage: int = 1, **engine: object) -> int:
        config = dataclasses.replace(small, engine=dataclasses.replace(small.engine, zero_stage=1, **engine))
        return memory(config, SIZES, 2, stage, 1024, 0)[name]

    assert part("optimizer", offload_optimizer=True) == 0
    pieces = part("activations", micro_batch=8)
    assert pieces == 64 + 8 * 10 + 4 * 4 * small.model.width * 512
    ring = dataclasses.replace(small, loss=dataclasses.replace(small.loss, exchange="ring"))
    assert memory(ring, SIZES, 8, 1, 8192, 0)["gathered"] < memory(small, SIZES, 8, 1, 8192, 0)["gathered"]


@pytest.mark.parametrize("stage", range(4))
def test_the_largest_batch_fits_and_the_next_does_not(small: object, stage: int) -> None:
    sizes = dataclasses.replace(SIZES, saved_per_pair=1 << 20)
    found = largest_batch(small, sizes, 4, stage, GIB, bucket=1000)
    assert found % 4 == 0
    takes = [sum(memory(small, sizes, 4, stage, batch, 1000).values()) for batch in (found, found + 4)]
    assert takes[0] <= GIB < takes[1]
    assert largest_batch(small, sizes, 4, stage, 1000, bucket=1000) == 0


def test_activations_grow_with_the_pairs_and_shrink_with_checkpointing() -> None:
    config = RECIPES["scenes_small_pretrain"]()
    tower = {**config.model.image_encoder.config}
    sizes = measure_sizes(config, words=100, local_batch=128)
    assert sizes.parameters == sizes.learned == sum(p.numel() for p in build(config, 100, 128).parameters())
    assert sizes.saved_per_pair > 0
    engine = dataclasses.replace(config.engine, activation_checkpointing=True)
    less = measure_sizes(dataclasses.replace(config, engine=engine), words=100, local_batch=128)
    assert less.saved_per_pair < sizes.saved_per_pair
    assert tower == config.model.image_encoder.config


def test_the_command_prints_all_parts(capsys: pytest.CaptureFixture) -> None:
    assert plan.main("scenes_small_pretrain --gpus 2 --memory 4 --throughput 200".split()) == 0
    out = capsys.readouterr().out
    for name in (*PARTS, "total", "fits 4 GiB", "largest batch", "their gradients", "ZeRO 3"):
        assert name in out
    assert "4,000 images, the usual size of scenes: 31 steps" in out
    assert "0.3 minutes an epoch at 200 pairs/s" in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("scenes_smal_pretrain", "did you mean 'scenes_small_pretrain'"),
        ("scenes_small_pretrain --optim.rl 1", "no field 'optim.rl'"),
        ("scenes_small_pretrain --gpus 3", "128 does not divide among 3 workers: set it to 126 or 129"),
        ("scenes_small_pretrain --batch_size 2 --gpus 3", "does not divide among 3 workers: set it to 3"),
        ("scenes_small_pretrain --gpus 0", "--gpus"),
        ("scenes_small_pretrain --memory 0", "--memory 0"),
        ("scenes_small_pretrain --memory inf", "--memory inf"),
        ("scenes_small_pretrain --memory 1e305", "--memory 1e+305"),
        ("scenes_small_pretrain --throughput -1", "--throughput -1"),
        ("scenes_small_pretrain --throughput inf", "--throughput inf"),
        ("scenes_small_pretrain --batch_size 8192", "use a batch of at most 4000 (4,000 images"),
        ("scenes_small_pretrain --data nowhere", "nowhere"),
    ],
)
def test_a_mistake_is_one_line(arguments: str, message: str, capfd: pytest.CaptureFixture) -> None:
    try:
        code = plan.main(arguments.split())
    except SystemExit as left:
        code = left.code
    assert code == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.dist
@pytest.mark.timeout(400)
def test_a_real_run_takes_what_was_planned(capsys: pytest.CaptureFixture) -> None:
    arguments = "scenes_small_pretrain --gpus 2 --memory 4 --check --batch_size 16 --engine.zero_stage 2"
    assert plan.main([*arguments.split(), "--data.loader_workers", "0"]) == 0
    out = capsys.readouterr().out
    off = {name: float(value) for name, value in re.findall(r"^  (\w+) .* ([+-][\d.]+)%$", out, re.MULTILINE)}
    assert abs(off["weights"]) < 1
    assert abs(off["optimizer"]) < 1
    assert abs(off["gradients"]) < 5
    # Captions are planned at their longest.
    assert -10 < off["activations"] < 100
    assert "pairs/s over all workers" in out
