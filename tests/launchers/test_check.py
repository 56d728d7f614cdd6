"""The pre-flight: on a real allocation with and without faults, and on made-up reports."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cluster import Cluster

from d2s.launchers.check import find_faults, parse_reports
from d2s.launchers.check_rank import PORT, check_gpus, rendezvous, write_token
from d2s.workers.devices import cuda_index

HERE = [sys.executable, "-m", "d2s.launchers.check", "--cpu", "--min-free", "0"]
HERE += ["--patience", "60", "--limit", "150"]  # for a busy machine
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
    """Three faults at once: on node n1 another package and a mount that hides the data, on n0 a taken port."""
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
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = check(cluster, project, D2S_ENV=f"venv:{tmp_path}", D2S_PORT=port)
    assert done.returncode == 1, done
    assert "FAULT    node n1: data unreadable: data/scenes has no manifest.parquet" in done.stdout
    assert "FAULT    node n1: version of transformers is 0.0.1, elsewhere" in done.stdout
    assert f"FAULT    node n0: port of the rendezvous: {port} is taken; set D2S_PORT" in done.stdout
    assert "verdict  3 faults" in done.stdout


def test_outside_of_an_allocation() -> None:
    done = subprocess.run(HERE, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert "no allocation" in done.stderr


WELL = {
    "node": "a", "same": {"data": "f", "version of torch": "2"}, "faults": {"run folder not writable": ""},
    "free": 10**12, "gpus": ["x", "y", "z"], "unseen": [], "met": True, "clock": 100.0, "bytes_per_second": 1e9,
}  # fmt: skip


@pytest.mark.parametrize(
    "change, line",
    [
        ({"faults": {"data unreadable": "gone"}}, "node b: data unreadable: gone"),
        ({"same": {"data": "g", "version of torch": "2"}}, "node b: data is g, elsewhere f"),
        ({"unseen": [0]}, "node b: rank 2 does not see what ranks 0 wrote"),
        ({"same": {"data": "f", "version of torch": "3"}}, "node b: version of torch is 3, elsewhere 2"),
        ({"clock": 160.0}, "the clocks of the nodes are 60 s apart"),
        ({"free": 10**9}, "node b: 1.0 GB free for the run, below --min-free 20"),
    ],
)
def test_each_fault_is_one_line(change: dict, line: str) -> None:
    reports = {0: WELL, 1: WELL, 2: {**WELL, "node": "b", **change}}
    found = find_faults(reports, 3, min_free=20)
    assert len(found) == 1
    assert found[0].startswith(line)
    assert find_faults({0: WELL, 1: WELL}, 2, min_free=20) == []


def test_rank_that_stopped_half_way() -> None:
    """After its first lines; if rank 0 could not listen, that is the only fault."""
    hung = {name: WELL[name] for name in ("node", "same", "faults", "free")}
    assert find_faults({0: WELL, 1: hung}, 2, min_free=20) == ["node a: ranks 1 never met the others"]
    taken = {**hung, "faults": {PORT: "7 is taken"}}
    assert find_faults({0: taken, 1: hung}, 2, min_free=20) == [f"node a: {PORT}: 7 is taken"]


def test_node_with_fewer_gpus_than_ranks() -> None:
    """Ranks that see one GPU each, all of them as number 0, are not ranks that share one."""
    bound = {rank: {**WELL, "gpus": [f"gpu-{rank}"]} for rank in range(3)}
    assert find_faults(bound, 3, min_free=20) == []
    found = find_faults({rank: {**WELL, "gpus": ["a", "b"]} for rank in range(3)}, 3, min_free=20)
    assert [line.partition(";")[0] for line in found] == ["node a: 3 ranks on a node that shows 2 GPUs"]


def test_rank_without_a_gpu_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for asked, reason in (("8", "the job holds 8 on this node"), ("0", "the job asked for none; add --gres")):
        monkeypatch.setenv("SLURM_GPUS_ON_NODE", asked)
        assert check_gpus()["faults"]["no GPU visible"].startswith(reason)


def test_run_folder_that_cannot_be_written_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("RANK", "0")
    (tmp_path / "runs").touch()
    assert write_token(tmp_path / "runs", "ready") == f"{tmp_path}/runs/.check-7/0: Not a directory"


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
    assert parse_reports(capsys.readouterr().out) == {
        5: {"faults": {"rendezvous failed": "CUDA error: invalid device ordinal 5"}, "same": {}, "met": False}
    }


def test_gpu_bound_to_a_task_is_number_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert cuda_index(3) == 3
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert cuda_index(3) == 0


def test_silent_ranks() -> None:
    assert find_faults({0: WELL}, 3, min_free=20)[0].startswith("ranks 1, 2 never started")


def test_facts_are_found_among_other_output() -> None:
    text = 'warning: x\nd2s-check {"rank": 1, "same": {"x": "1"}}\nnoise d2s-check {"rank": 1, "same": {"y": "2"}}\n'
    assert parse_reports(text) == {1: {"faults": {}, "same": {"x": "1", "y": "2"}}}
