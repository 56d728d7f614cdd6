"""The pre-flight: each fault it is there for, provoked on a real allocation, and its verdict on made-up facts."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cluster import Cluster

from d2s.launchers.check import faults, gathered
from d2s.launchers.check_rank import rendezvous
from d2s.workers.devices import cuda_index

HERE = [sys.executable, "-m", "d2s.launchers.check", "--cpu", "--min-free", "0"]
SHAPE = ["--nodelist=n0,n1", "--ntasks-per-node=1", "--cpus-per-task=1"]


def check(cluster: Cluster, project: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess:
    """The check inside an allocation of two nodes."""
    return subprocess.run(
        ["salloc", *SHAPE, *HERE, "--data", "data/scenes", "--run", "runs/check", *arguments],
        cwd=project, env={**cluster.environment, **more}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip


@pytest.mark.dist
@pytest.mark.slow
def test_fit(cluster: Cluster, project: Path) -> None:
    done = check(cluster, project)
    assert done.returncode == 0, done
    assert "verdict  fit to train" in done.stdout
    assert "2 on 2 nodes (n0: 1, n1: 1)" in done.stdout
    assert "all-reduce of 64 MiB" in done.stdout
    assert not list((project / "runs").glob("check/.check-*"))


@pytest.mark.dist
@pytest.mark.slow
def test_node_without_data_other_versions_and_taken_port(
    cluster: Cluster, project: Path, tmp_path: Path
) -> None:
    """Three faults of three kinds at once; node n1 has a mount of its own over the data, and another package."""
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    other = tmp_path / "other/transformers-0.0.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 0.0.1\n")
    script = f"""#!/bin/bash
if [ "$SLURMD_NODENAME" != n1 ]; then exec {sys.executable} "$@"; fi
export PYTHONPATH={other.parent}
exec unshare --mount bash -c 'mount -t tmpfs none data/scenes && exec {sys.executable} "$@"' sh "$@"
"""
    python.write_text(script)
    python.chmod(0o755)
    done = check(cluster, project, "--patience", "8", D2S_ENV=f"venv:{tmp_path}")
    assert done.returncode == 1, done
    assert "FAULT    node n1: data unreadable: data/scenes has no manifest.parquet" in done.stdout
    assert "FAULT    node n1: version of transformers is 0.0.1, elsewhere" in done.stdout


@pytest.mark.dist
@pytest.mark.slow
def test_taken_port(cluster: Cluster, project: Path) -> None:
    import socket

    with socket.create_server(("", 0)) as held:
        port = str(held.getsockname()[1])
        done = check(cluster, project, "--patience", "8", D2S_PORT=port)
    assert done.returncode == 1, done
    assert f"FAULT    node n0: port of the rendezvous: {port} is taken; set D2S_PORT" in done.stdout


def test_outside_of_an_allocation() -> None:
    done = subprocess.run(HERE, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert "no allocation" in done.stderr


WELL = {
    "node": "a", "versions": {"torch": "2"}, "data": {"fingerprint": "f"}, "shared": "", "free": 10**12,
    "gpus": 1, "devices": ["x", "y", "z"], "asked": "8", "unseen": [], "rendezvous": "", "clock": 100.0,
    "bytes_per_second": 1e9,
}  # fmt: skip


@pytest.mark.parametrize(
    "change, line",
    [
        ({"data": {"fault": "gone"}}, "node b: data unreadable: gone"),
        ({"data": {"fingerprint": "g"}}, "node b: data is g, elsewhere f"),
        ({"shared": "read-only"}, "node b: run folder not writable: read-only"),
        ({"unseen": [0]}, "node b: rank 2 does not see what ranks 0 wrote"),
        ({"versions": {"torch": "3"}}, "node b: version of torch is 3, elsewhere 2"),
        ({"gpus": 0}, "node b: no GPU visible: the job holds 8"),
        ({"rendezvous": "timed out"}, "node b: rendezvous failed: timed out"),
        ({"clock": 160.0}, "the clocks of the nodes are 60 s apart"),
        ({"free": 10**9}, "node b: 1.0 GB free for the run, below --min-free 20"),
    ],
)
def test_each_fault_is_one_line(change: dict, line: str) -> None:
    facts = {0: WELL, 1: WELL, 2: {**WELL, "node": "b", **change}}
    found = faults(facts, 3, min_free=20)
    assert len(found) == 1
    assert found[0].startswith(line)
    assert faults({0: WELL, 1: WELL}, 2, min_free=20) == []


def test_node_with_fewer_gpus_than_ranks() -> None:
    """Ranks that see one GPU each, number 0 to all of them, are told from ranks that share one."""
    bound = {rank: {**WELL, "devices": [f"gpu-{rank}"]} for rank in range(3)}
    assert faults(bound, 3, min_free=20) == []
    found = faults({rank: {**WELL, "devices": ["a", "b"]} for rank in range(3)}, 3, min_free=20)
    assert [line.partition(";")[0] for line in found] == ["node a: 3 ranks on a node that shows 2 GPUs"]


def test_device_that_is_not_there_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refuse(device: torch.device) -> None:
        raise RuntimeError(f"CUDA error: invalid device ordinal {device.index}")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    for name, text in {"RANK": "5", "LOCAL_RANK": "5", "WORLD_SIZE": "6"}.items():
        monkeypatch.setenv(name, text)
    rendezvous(1)
    assert gathered(capsys.readouterr().out) == {5: {"rendezvous": "CUDA error: invalid device ordinal 5"}}


def test_gpu_bound_to_a_task_is_number_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert cuda_index(3) == 3
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert cuda_index(3) == 0


def test_silent_ranks() -> None:
    assert faults({0: WELL}, 3, min_free=20)[0].startswith("ranks 1, 2 never started")


def test_facts_are_found_among_other_output() -> None:
    text = 'warning: x\nd2s-check {"rank": 1, "node": "a"}\nnoise d2s-check {"rank": 1, "port": ""}\n'
    assert gathered(text) == {1: {"node": "a", "port": ""}}
