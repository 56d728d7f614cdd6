"""A worker that dies ends the job: all others within seconds, with a code that is not 0, its error last."""

import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from d2s.shards.cli import main as shard
from d2s.workers.group import start_workers

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]
FAULTS = str(Path(__file__).parents[1] / "faults.py")
BOUND = 30.0
KINDS = ("raise", "exit", "hard exit", "kill")
ARGUMENTS = (
    "scenes_small_pretrain --batch_size 8 --log.every 1 --validation.every_epochs 1 --data.loader_workers 1 "
    "--data.image_size 32 --model.image_size 32 --model.width 16 --optim.warmup_steps 0 --max_steps 5"
).split()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 scenes to train on: three steps an epoch at a batch of 8, so step 3 comes after an evaluation."""
    out = tmp_path_factory.mktemp("dead") / "scenes"
    assert shard(f"build --source scenes --count train=24,val=8,test=8 --size 32 --out {out}".split()) == 0
    return out


def environment() -> dict[str, str]:
    return {**os.environ, "D2S_THREADS": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def trials(scenes: Path) -> list[dict[str, Any]]:
    """Twelve trainings of two workers, of which one dies at a random step, and two in which none does."""
    draw = random.Random(0)
    faults = [
        {"rank": draw.randrange(2), "step": draw.randrange(5), "kind": KINDS[number % 4]}
        for number in range(12)
    ]
    faults += [{"rank": 1, "step": 2, "kind": "pause"}, {"rank": None, "step": 0, "kind": "none"}]
    jobs = []
    for number, fault in enumerate(faults):
        arguments = [*ARGUMENTS, "--data", str(scenes), "--run", str(scenes.parent / f"run{number}")]
        screen = str(scenes.parent / f"screen{number}.txt")
        jobs.append({"arguments": arguments, "fault": fault, "screen": screen})
    path = scenes.parent / "trials.json"
    path.write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, FAULTS, "--trials", str(path)],
        capture_output=True, text=True, timeout=590, env=environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def last_line(trial: dict[str, Any]) -> str:
    return trial["screen"].strip().splitlines()[-1]


def test_twelve_of_twelve_jobs_end_in_time(trials: list[dict[str, Any]]) -> None:
    dead = [trial for trial in trials if trial["fault"]["kind"] in KINDS]
    assert len(dead) == 12
    for trial in dead:
        fault = trial["fault"]
        died, survived = trial["codes"][fault["rank"]], trial["codes"][1 - fault["rank"]]
        assert died == {"raise": 1, "exit": 0, "hard exit": 0, "kill": -9}[fault["kind"]], trial
        assert survived == 1, trial
        assert trial["seconds"] < BOUND, trial
        rank = fault["rank"]
        if fault["kind"] == "raise":
            assert last_line(trial) == f"[rank{rank}]: KeyError: 'boom: a planted fault'"
        else:
            assert f"worker {rank} ended without an error message" in last_line(trial)
    print(
        f"\n12 of 12 ended, the slowest {max(trial['seconds'] for trial in dead):.1f} s after the first worker"
    )


def test_a_worker_that_is_only_stopped_for_a_while_is_not_dead(trials: list[dict[str, Any]]) -> None:
    (paused,) = [trial for trial in trials if trial["fault"]["kind"] == "pause"]
    assert paused["codes"] == [0, 0], paused["screen"]


def test_an_ordered_end_is_no_death(trials: list[dict[str, Any]]) -> None:
    (peaceful,) = [trial for trial in trials if trial["fault"]["kind"] == "none"]
    assert peaceful["codes"] == [0, 0]
    assert "error" not in peaceful["screen"]
    assert last_line(peaceful).startswith("done: 5 steps")


@pytest.mark.parametrize(
    "launcher, kind, rank, shown",
    [
        # It takes a worker that leaves with 0 for one that is done.
        ("torchrun", "exit", 1, "worker 1 ended without an error message"),
        # It closes with a table, which holds the error.
        ("torchrun", "raise", 1, "KeyError: 'boom: a planted fault'"),
        ("deepspeed", "kill", 0, "worker 0 ended without an error message"),
    ],
)
def test_under_a_launcher(
    scenes: Path, tmp_path: Path, launcher: str, kind: str, rank: int, shown: str
) -> None:
    mark = tmp_path / "mark"
    binary = str(Path(sys.executable).with_name("deepspeed"))
    start = {
        "torchrun": [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node 2 --".split()],
        "deepspeed": [binary, "--num_accelerators", "2", "--master_port", _port()],
    }[launcher]
    fault = {"rank": rank, "step": 3, "kind": kind, "mark": str(mark)}
    done = subprocess.run(
        [*start, FAULTS, *ARGUMENTS, "--data", str(scenes), "--run", str(tmp_path / "run")],
        capture_output=True, text=True, timeout=300, env={**environment(), "FAULT": json.dumps(fault)},
        check=False,
    )  # fmt: skip
    assert time.time() - mark.stat().st_mtime < BOUND
    assert done.returncode != 0
    assert shown in done.stderr
    if kind == "raise":
        assert shown in "".join(done.stderr.strip().splitlines()[-4:])


STUCK = """
import os, sys, time
from d2s.workers.collectives import barrier
from d2s.workers.group import start_workers
workers = start_workers()
barrier()
if workers.rank == 2:
    os._exit(0)
time.sleep(100)  # as in an exchange on a GPU that never comes back: nothing raises
"""


def test_the_watchdog_alone_ends_workers_that_are_stuck() -> None:
    """Four workers: all but worker 0 learn of a death through worker 0."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _port(), "WORLD_SIZE": "4"}
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", STUCK],
            env={**environment(), **address, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(4)
    ]  # fmt: skip
    jobs[2].wait(120)
    start = time.monotonic()
    shown = [job.communicate(timeout=BOUND)[1] for job in jobs]
    assert time.monotonic() - start < BOUND
    assert [job.returncode for job in jobs] == [1, 1, 0, 1]
    assert "worker 2 ended without an error message" in shown[0]
    assert shown[1:] == ["", "", ""]  # said once


def _port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_the_wait_for_a_silent_worker_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D2S_TIMEOUT", "soon")
    with pytest.raises(ValueError, match=re.escape("D2S_TIMEOUT is 'soon': give minutes, above 0")):
        start_workers()
