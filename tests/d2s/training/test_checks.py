"""What is refused before a run starts."""

import re

import pytest

from d2s.losses.config import LossConfig
from d2s.losses.table import DISTILLATIONS, LOSSES, losses_of
from d2s.shards.cli import main as shard
from d2s.train import main
from d2s.training.arguments import parse
from d2s.training.checks import check_arguments


@pytest.fixture(scope="module", params=[16, 1])
def images(request, tmp_path_factory):
    """Number of training images, and their data set."""
    out = tmp_path_factory.mktemp("checks") / "scenes"
    command = f"build --source scenes --count train={request.param},val=4,test=4 --size 32 --out {out}"
    assert shard(command.split()) == 0
    return request.param, out


def checked(data, *more):
    return check_arguments(*parse(["scenes_small_align", "--data", str(data), "--dry-run", *more]))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_without_a_negative_is_refused(images, loss):
    count, data = images
    wanted = (
        "batch_size is 1: .* raise it to 2" if count > 1 else "train split of .* has 1 image: .* build it"
    )
    for micro in ("0", "1"):
        with pytest.raises(ValueError, match=wanted):
            checked(data, "--batch_size", "1", "--engine.micro_batch", micro, "--loss.align", loss)
    if count > 1:
        checked(data, "--batch_size", "2", "--engine.micro_batch", "1", "--model.text_mlp_norm", "layer")


def test_pointwise_distillation_needs_no_negative():
    for name in DISTILLATIONS:
        losses = losses_of(LossConfig(align_weight=0, distill_weight=1, distill=name))
        assert [loss.compares_pairs for loss in losses] == [name == "relational"]


def test_the_command_says_so_in_one_line(images, tmp_path, capfd):
    _, data = images
    arguments = f"scenes_small_align --data {data} --run {tmp_path / 'run'} --batch_size 1 --max_steps 20"
    assert main(arguments.split()) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert re.search("batch_size is 1|1 image", lines[0])
    assert not (tmp_path / "run").exists()
