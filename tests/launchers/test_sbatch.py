"""`sbatch launchers/pretrain.slurm` on a real SLURM: the same losses, and every interruption survived."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster import Cluster
from conftest import ROOT, TRAIN, losses, wait_for_step, weights

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(900)]
# So many that one minute is not enough, start-up included.
LONGER = "100"
SHAPE = ["--nodes=2", "--ntasks-per-node=2", "--gres=gpu:2", "--cpus-per-task=1"]


def submit(cluster: Cluster, project: Path, run: str, *options: str, more: list[str] | None = None) -> str:
    """Submits the training into runs/RUN; the job's number."""
    out = cluster.call(
        "sbatch", *SHAPE, *options, "launchers/pretrain.slurm", *TRAIN, *(more or []), "--run", f"runs/{run}",
        cwd=project,
    )  # fmt: skip
    return out.split()[-1]


def ranks(project: Path) -> list[int]:
    """The processes that train in this project's folder."""
    found = subprocess.run(["pgrep", "-f", "d2s.launchers.task"], capture_output=True, text=True)
    return [pid for pid in map(int, found.stdout.split()) if _cwd(pid) == project]


def _cwd(pid: int) -> Path | None:
    try:
        return Path(os.readlink(f"/proc/{pid}/cwd"))
    except OSError:
        return None


def assert_nothing_left(project: Path, seconds: float = 30) -> None:
    """No process of the job is left on any node."""
    end = time.monotonic() + seconds
    while left := ranks(project):
        assert time.monotonic() < end, f"left behind: {left}"
        time.sleep(0.2)


def test_two_nodes_equal_torchrun(cluster: Cluster, project: Path, undisturbed: Path) -> None:
    number = submit(cluster, project, "slurm", "--wait")
    assert cluster.job(number)["ExitCode"] == "0:0"
    assert losses(project / "runs/slurm") == losses(undisturbed)
    assert weights(project / "runs/slurm") == weights(undisturbed)
    assert (project / f"logs/d2s-pretrain-{number}/rank-3.log").is_file()
    assert_nothing_left(project)


def test_signal_requeue_and_lost_node(cluster: Cluster, project: Path, undisturbed: Path) -> None:
    """One job, three interruptions in a row; at the end the weights of the run that was left alone."""
    run = project / "runs/interrupted"
    number = submit(cluster, project, "interrupted", "--exclude=n3")
    wait_for_step(run, 3)
    cluster.call("scancel", "--signal=USR2", number)
    cluster.wait_job(number, ("PENDING",))
    wait_for_step(run, 8)
    cluster.call("scontrol", "requeue", number)
    cluster.wait_job(number, ("PENDING",))
    wait_for_step(run, 13)
    node = cluster.job(number)["BatchHost"]
    cluster.call("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    cluster.wait_job(number, ("PENDING",))
    # It comes back by itself as soon as it registers again; then there is nothing to resume.
    cluster.call("scontrol", "update", f"nodename={node}", "state=resume", check=False)
    facts = cluster.wait_job(number, ("COMPLETED", "FAILED"))
    assert facts["JobState"] == "COMPLETED"
    assert int(facts["Restarts"]) == 3
    assert losses(run) == losses(undisturbed)
    assert weights(run) == weights(undisturbed)
    assert_nothing_left(project)


def test_killed_rank_is_a_clear_failure(cluster: Cluster, project: Path) -> None:
    run = project / "runs/killed"
    number = submit(cluster, project, "killed")
    wait_for_step(run, 2)
    victims = [
        pid for pid in ranks(project) if b"SLURM_PROCID=2" in Path(f"/proc/{pid}/environ").read_bytes()
    ]
    os.kill(victims[0], signal.SIGKILL)
    killed = time.monotonic()
    facts = cluster.wait_job(number, ("COMPLETED", "FAILED", "NODE_FAIL"), seconds=60)
    assert facts["JobState"] == "FAILED"
    assert time.monotonic() - killed < 45
    text = (project / f"slurm-d2s-pretrain-{number}.out").read_text()
    assert re.search(r"ended with code \d+: see logs/", text), text
    assert_nothing_left(project)


def test_cancelled_stays_cancelled(cluster: Cluster, project: Path) -> None:
    number = submit(cluster, project, "cancelled")
    wait_for_step(project / "runs/cancelled", 2)
    cluster.call("scancel", number)
    assert cluster.wait_job(number, ("CANCELLED", "PENDING", "COMPLETED"), 60)["JobState"] == "CANCELLED"
    assert_nothing_left(project)
    time.sleep(1)
    assert cluster.job(number)["JobState"] == "CANCELLED"


def test_time_limit_hit_again_and_again(cluster: Cluster, project: Path) -> None:
    """A limit of one minute, a training that takes longer: requeued each time, the same weights at the end."""
    longer = ["--max_steps", LONGER]
    run, alone = project / "runs/limited", project / "runs/alone"
    number = submit(cluster, project, "limited", "--time=1", "--signal=USR2@10", more=longer)
    facts = cluster.wait_job(number, ("COMPLETED", "FAILED", "TIMEOUT"), seconds=600)
    assert facts["JobState"] == "COMPLETED", (project / f"slurm-d2s-pretrain-{number}.out").read_text()
    assert int(facts["Restarts"]) >= 1
    submit(cluster, project, "alone", "--wait", more=longer)
    assert weights(run) == weights(alone)
    assert losses(run) == losses(alone)


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


@pytest.mark.parametrize("path", [*sorted((ROOT / "launchers").glob("*.slurm")), ROOT / "launchers/job.sh"])
def test_shellcheck(path: Path) -> None:
    done = subprocess.run(["shellcheck", "-x", path], capture_output=True, text=True, cwd=ROOT)
    assert not done.returncode, done.stdout
