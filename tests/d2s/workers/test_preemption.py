"""Preemption and numbers that are not finite: what all workers agree upon, and that a resumed run loses nothing."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from safetensors.torch import load_file

from d2s.shards.cli import main as shard
from d2s.training.run_log import read_rows
from d2s.workers.preemption import Preemption

pytestmark = pytest.mark.timeout(900)  # the first case waits for a group that goes through all of them
SMALL = (
    "--batch_size 8 --log.every 1 --data.loader_workers 1 --data.image_size 32 --model.image_size 32 "
    "--model.width 16 --optim.warmup_steps 0 --validation.every_epochs 1"
)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 scenes to train on: six steps an epoch at a batch of 8."""
    out = tmp_path_factory.mktemp("preemption") / "scenes"
    assert shard(f"build --source scenes --count train=48,val=8,test=8 --size 32 --out {out}".split()) == 0
    return out


@pytest.fixture(scope="module")
def group(scenes: Path) -> tuple[Path, dict[str, Any]]:
    """Two workers went through all the cases of `preempt_cases`: their folder, and what they found."""
    folder = scenes.parent
    done = forked.run("preempt_cases:main", str(scenes), folder, workers=2, timeout=840)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, json.loads((folder / "results.json").read_text())


def losses(run: Path) -> dict[int, dict[str, Any]]:
    """The row of each step, without what a clock decides."""
    timed = ("seconds", "samples_per_s")
    rows = [row for row in read_rows(run) if row["kind"] == "train"]
    return {row["step"]: {k: v for k, v in row.items() if k not in timed} for row in rows}


def same_end(run: Path, other: Path) -> bool:
    """Whether two runs logged the same steps and ended with the same weights, to the bit."""
    ours, theirs = (load_file(folder / "last" / "model.safetensors") for folder in (run, other))
    return losses(run) == losses(other) and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.dist
@pytest.mark.parametrize(
    "case, peace, step, to_validate, saves",
    [
        ("all", "in peace", 3, False, 1),
        ("one worker", "in peace", 5, False, 1),
        # At the end of an epoch, what is due there is not forgotten.
        ("last step of an epoch", "in peace", 6, True, 1),
        # The checkpoint before the evaluation is enough.
        ("evaluation", "in peace", 6, True, 1),
        # Three signals, of which the first is seen after the write.
        ("saving", "in peace", 6, True, 1),
        # Between two rows of metrics, just after an extra checkpoint of the same step.
        ("windows", "windows in peace", 4, False, 2),
        # The micro-batches of a step that was begun are dropped.
        ("accumulation", "cut in peace", 2, False, 1),
    ],
)
def test_a_preempted_run_goes_on_as_if_left_in_peace(
    group: tuple[Path, dict], case: str, peace: str, step: int, to_validate: bool, saves: int
) -> None:
    folder, results = group
    assert results[case]["codes"] == [75, 75]
    assert (results[case]["step"], results[case]["to_validate"]) == (step, to_validate)
    assert results[case]["saves"] == saves
    assert results[f"{case}, resumed"]["codes"] == [0, 0]
    assert sorted(losses(folder / peace))[-1] == 8
    assert same_end(folder / case, folder / peace)
    validated = [
        [row["step"] for row in read_rows(folder / run) if row["kind"] == "val"] for run in (case, peace)
    ]
    assert validated[0] == validated[1] == [6, 8]


@pytest.mark.dist
def test_a_chain_of_restarts_that_gets_no_further_ends(group: tuple[Path, dict]) -> None:
    folder, results = group
    assert [results[f"start {number}"]["codes"] for number in range(4)] == [[75, 75]] * 3 + [[1, 1]]
    line = results["start 3"]["errors"][0][0]
    assert "3 starts in a row began at the beginning and saved nothing after it" in line
    assert "--checkpoint.max_stalled_restarts 0" in line
    assert results["start 4"]["codes"] == [0, 0]
    assert same_end(folder / "stalled", folder / "in peace")
    # To ask a run that is done again and again is no chain.
    assert results["done again"]["codes"] == [0, 0]


@pytest.mark.dist
def test_a_signal_while_the_teacher_speaks_ends_the_run_before_it_begins(group: tuple[Path, dict]) -> None:
    _, results = group
    assert results["teacher"] == {"codes": [75, 75], "saves": 0, "errors": [[], []], "table": False}
    assert results["teacher, resumed"]["codes"] == [0, 0]


@pytest.mark.dist
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_what_is_not_finite_on_one_worker_is_skipped_by_all(
    group: tuple[Path, dict], kind: str, stage: int
) -> None:
    folder, results = group
    found = results[f"{kind}, ZeRO {stage}"]
    assert found["codes"] == [0, 0]
    assert found["moved"] == [[False, False], [False, False]]
    rows = losses(folder / f"{kind}, ZeRO {stage}")
    assert [rows[step]["skipped"] for step in range(1, 9)] == [0, 0, 1, 2, 2, 2, 2, 2]
    assert all(0 < rows[step]["loss"] < 1e4 for step in (1, 2, 5, 6, 7, 8))
    reference = losses(folder / f"{kind}, ZeRO 0")
    assert rows[8]["loss"] == pytest.approx(reference[8]["loss"], rel=1e-4)


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["loss", "loss in pieces", "gradient", "gradient in pieces"])
def test_too_many_skipped_steps_end_the_run_with_worker_and_samples(
    group: tuple[Path, dict], kind: str
) -> None:
    _, results = group
    found = results[f"{kind}, limit"]
    assert found["codes"] == [1, 1]
    line = found["errors"][0][0]
    what = kind.split()[0]
    assert f"the {what} was not finite in 2 steps in a row, the last on worker 1 with samples scene-" in line
    assert "worker 0" not in line
    assert line.count("scene-") == 4


@pytest.mark.dist
def test_a_signal_from_outside_reaches_loader_processes_too(scenes: Path, tmp_path: Path) -> None:
    """As a batch system does it: no launcher, and every process of the job is signalled, at any moment."""
    arguments = f"scenes_small_pretrain --data {scenes} --run {tmp_path}/run --max_steps 5000 {SMALL}".split()
    jobs = forked.start("forked:train", arguments, folder=tmp_path, workers=2, NEW_SESSION="1")
    deadline = time.monotonic() + 120
    while len(losses(tmp_path / "run")) < 3:
        assert time.monotonic() < deadline
        assert all(job.is_alive() for job in jobs), (tmp_path / "0.err").read_text()
        time.sleep(0.1)
    for job in jobs:
        os.killpg(job.pid, signal.SIGTERM)
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [75, 75], (tmp_path / "0.err").read_text()
    last = (tmp_path / "0.out").read_text().strip().splitlines()[-1]
    step = max(losses(tmp_path / "run"))
    assert last == f"preempted by SIGTERM at step {step}: its checkpoint is complete; --resume goes on"
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:08d}" / "complete.json").is_file()


def test_term_counts_most_in_whatever_order_signals_come() -> None:
    usr2, term = signal.SIGUSR2, signal.SIGTERM
    for numbers in ([usr2, term], [term, usr2], [usr2, term, signal.SIGUSR1]):
        preemption = Preemption()
        assert preemption.agreed() == 0
        for number in numbers:
            preemption._note(number, None)
        assert preemption.agreed() == preemption.received == term
