"""`sbatch launchers/pretrain.slurm` on a real SLURM: the losses of torchrun, whatever interrupts the job."""

import math
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster import Cluster
from programs import ROOT
from sbatch_runs import TRAIN, losses, paused, ranks, wait_for_step, weights

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(600)]
SHAPE = ["--nodes=2", "--ntasks-per-node=1", "--gres=gpu:1", "--cpus-per-task=1"]


def submit(cluster: Cluster, project: Path, run: str, *options: str) -> str:
    """Submits the training into runs/RUN; the job's number."""
    out = cluster.call(
        "sbatch", *SHAPE, *options, "launchers/pretrain.slurm", *TRAIN, "--run", f"runs/{run}", cwd=project
    )
    return out.split()[-1]


def assert_nothing_left(project: Path, job: str, seconds: float = 30) -> None:
    """No process of the job is left on any node."""
    end = time.monotonic() + seconds
    while left := ranks(project, job):
        assert time.monotonic() < end, f"left behind: {left}"
        time.sleep(0.2)


def test_time_limit_requeue_and_lost_node(cluster: Cluster, project: Path) -> None:
    """One job on two nodes, three interruptions in a row; losses and weights of an undisturbed run of torchrun."""
    run, alone = project / "runs/interrupted", project / "runs/torchrun"
    number = submit(cluster, project, "interrupted", "--exclude=n3", "--signal=USR2@60")
    wait_for_step(run, 3)
    with paused(project, number):
        hours, minutes, seconds = map(int, cluster.job(number)["RunTime"].split(":"))
        # The nearest limit that the controller, which looks every 30 seconds, cannot miss.
        limit = math.ceil(60 * hours + minutes + (seconds + 45) / 60)
        cluster.call("scontrol", "update", f"jobid={number}", f"TimeLimit={limit}")
        torchrun = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--",
             ROOT / "d2s/train.py", *TRAIN, "--run", alone],
            cwd=project, env=cluster.environment, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        cluster.wait_job(number, ("PENDING",))
    cluster.call("scontrol", "update", f"jobid={number}", "TimeLimit=30")
    wait_for_step(run, 8)
    with paused(project, number):
        cluster.call("scontrol", "requeue", number)
    cluster.wait_job(number, ("PENDING",))
    wait_for_step(run, 13)
    with paused(project, number):
        node = cluster.job(number)["BatchHost"]
        cluster.call("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    cluster.wait_job(number, ("PENDING",))
    # The node comes back by itself as soon as it registers again; then there is nothing to resume.
    cluster.call("scontrol", "update", f"nodename={node}", "state=resume", check=False)
    facts = cluster.wait_job(number, ("COMPLETED", "FAILED"))
    assert facts["JobState"] == "COMPLETED"
    assert facts["ExitCode"] == "0:0"
    assert int(facts["Restarts"]) == 3
    assert torchrun.wait(timeout=100) == 0
    assert losses(run) == losses(alone)
    assert weights(run) == weights(alone)
    assert (project / f"logs/d2s-pretrain-{number}/rank-1.log").is_file()
    assert_nothing_left(project, number)


def test_killed_rank_is_a_clear_failure(cluster: Cluster, project: Path) -> None:
    run = project / "runs/killed"
    number = submit(cluster, project, "killed")
    wait_for_step(run, 2)
    [victim] = [rank for rank in ranks(project, number) if rank.environ()["SLURM_PROCID"] == "1"]
    victim.kill()
    killed = time.monotonic()
    facts = cluster.wait_job(number, ("COMPLETED", "FAILED", "NODE_FAIL"), seconds=60)
    assert facts["JobState"] == "FAILED"
    assert time.monotonic() - killed < 45
    text = (project / f"slurm-d2s-pretrain-{number}.out").read_text()
    assert re.search(r"ended with code \d+: see logs/", text), text
    assert_nothing_left(project, number)


def test_cancelled_stays_cancelled(cluster: Cluster, project: Path) -> None:
    number = submit(cluster, project, "cancelled")
    wait_for_step(project / "runs/cancelled", 2)
    cluster.call("scancel", number)
    assert cluster.wait_job(number, ("CANCELLED", "PENDING", "COMPLETED"), 60)["JobState"] == "CANCELLED"
    assert_nothing_left(project, number)
    time.sleep(1)
    assert cluster.job(number)["JobState"] == "CANCELLED"


def test_array_builds_shards(cluster: Cluster, project: Path) -> None:
    scenes = ["--source", "scenes", "--count", "train=60,val=10,test=10", "--shard-size", "20"]
    cluster.call(
        "sbatch", "--wait", "--array=0-2", "--cpus-per-task=1", "launchers/build_shards.slurm",
        *scenes, "--out", "data/parts", cwd=project,
    )  # fmt: skip
    assert "no fault" in cluster.call(sys.executable, "-m", "d2s.shard", "verify", "data/parts", cwd=project)


@pytest.mark.parametrize("name", ["pretrain", "finetune", "evaluate", "build_shards"])
def test_scripts_are_accepted(cluster: Cluster, project: Path, name: str) -> None:
    """By sbatch as they are but for their eight GPUs, which no fake node has."""
    script = f"launchers/{name}.slurm"
    fewer = ["--gres=gpu:4", "--ntasks-per-node=4", "--cpus-per-task=1"] if name != "build_shards" else []
    cluster.call("sbatch", "--test-only", *(fewer or ["--cpus-per-task=4"]), script, cwd=project)
