"""Pipelines and sweeps through submitit, on SLURM and on this machine, and what is refused before that."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import Cluster
from conftest import losses, wait_for_step

from d2s.launchers.pipeline import grid_points
from d2s.launchers.submit import main

COMMAND = [sys.executable, "-m", "d2s.launchers.submit"]
TINY = [
    "--set", "max_steps=3", "--set", "batch_size=16", "--set", "data.loader_workers=0", "--cpus", "1",
]  # fmt: skip
BUILD = "--source scenes --count train=60,val=12,test=12"


def call(cluster: Cluster, project: Path, *arguments: str) -> str:
    return cluster.call(*COMMAND, *arguments, cwd=project, timeout=560)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_pipeline_on_slurm(cluster: Cluster, project: Path) -> None:
    out = call(
        cluster,
        project,
        "pipeline",
        "--cluster",
        "slurm",
        "--tasks",
        "2",
        "--build",
        BUILD,
        "--out",
        "runs/p",
        *TINY,
    )
    for step in ("shards  job", "pretrain  job", "finetune  job", "evaluate  job"):
        assert f"`- {step}" in out
    assert "rSum" in out
    assert "sparse captions" in out
    assert (project / "runs/p/test.json").is_file()
    status = call(cluster, project, "status", "runs/p")
    assert status.count("COMPLETED") == 4
    assert "done: 3 steps" in call(cluster, project, "logs", "runs/p", "finetune")
    assert "every job has succeeded" in call(cluster, project, "resume", "runs/p")


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sweep_on_slurm(cluster: Cluster, project: Path) -> None:
    out = call(
        cluster, project, "sweep", "scenes_small_finetune", "--grid", "optim.lr=1e-4,2e-4",
        "--grid", "loss.distill_weight=0,1", "--build", BUILD, "--out", "runs/s", *TINY,
    )  # fmt: skip
    table = out[out.index("val rSum") :].splitlines()
    assert len(table) == 5
    assert all(f"runs/s/run-{i}" in line and " 3 " in line for i, line in enumerate(table[1:]))
    assert "best" in out


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_failed_step_is_told_and_resumed(cluster: Cluster, project: Path) -> None:
    """A missing dense file: the rest never starts, the reason is shown, and resume goes on once it is mended."""
    rows = [
        {"path": f"{i}.png", "sparse": ["a dog"], "split": s} for i, s in enumerate(["train", "val", "test"])
    ]
    (project / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    build = "--source jsonl --captions rows.jsonl --images pictures"
    done = subprocess.run(
        [*COMMAND, "pipeline", "--cluster", "slurm", "--build", build, "--out", "runs/f", "--no-gpus", *TINY],
        cwd=project, env=cluster.environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2
    assert "shards did not succeed" in done.stderr.replace("\n", " ")
    assert "pictures" in done.stdout
    assert "FAILED" in call(cluster, project, "status", "runs/f")


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_signalled_job_goes_on_by_itself(cluster: Cluster, project: Path) -> None:
    """One restart of the very job that the others wait for, and the run comes to its last step."""
    many = [*TINY[:1], "max_steps=100", *TINY[2:]]
    call(
        cluster, project, "sweep", "scenes_small_pretrain", "--grid", "optim.lr=1e-4", "--data", "data/scenes",
        "--cluster", "slurm", "--tasks", "2", "--out", "runs/again", "--set", "log.every=1", "--no-wait", *many,
    )  # fmt: skip
    number = json.loads((project / "runs/again/jobs.json").read_text())["steps"][0]["ids"][0]
    wait_for_step(project / "runs/again/run-0", 2)
    cluster.call("scancel", "--signal=USR2", number)
    cluster.wait_job(number, ("PENDING",), 60)
    assert int(cluster.wait_job(number, ("COMPLETED", "FAILED"))["Restarts"]) == 1
    assert "COMPLETED" in call(cluster, project, "status", "runs/again")
    assert max(losses(project / "runs/again/run-0")) == 100
    assert not list(project.glob(".requeue*"))


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_pipeline_here(tmp_path: Path) -> None:
    (tmp_path / "launchers").symlink_to(Path(__file__).parents[2] / "launchers")
    environment = {**os.environ, "D2S_THREADS": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [*COMMAND, "pipeline", "--cluster", "local", "--build", BUILD, "--out", "runs/p", "--tasks", "2", *TINY],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=560,
    )  # fmt: skip
    assert done.returncode == 0, done
    assert "`- evaluate" in done.stdout
    assert "sparse captions" in done.stdout
    assert json.loads((tmp_path / "runs/p/test.json").read_text())["images"] == 12


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["pipeline", "nosuch", "--data", "."], "no manifest.parquet"),
        (["pipeline", "f30k_vitb16_384"], "--data: missing"),
        (["pipeline", "scenes_smal", "--build", BUILD], "no scenes_smal_pretrain"),
        (["pipeline", "--set", "optim.lr=abc"], "optim.lr"),
        (["pipeline", "--set", "optim.lrr=1"], "did you mean 'optim.lr'"),
        (["pipeline", "--set", "optim.lr"], "is not FIELD=VALUE"),
        (["pipeline", "--tasks", "0"], "--tasks 0: must be 1 or more"),
        (["pipeline", "--minutes", "1"], "as long as the whole job"),
        (["sweep", "scenes_small_finetune"], "--grid: missing"),
        (["sweep", "scenes_small_finetune", "--grid", "optim.lr"], "is not FIELD=VALUE,VALUE"),
        (["sweep", "scenes_small_finetune", "--grid", "optim.no=1,2"], "no field 'optim.no'"),
        (
            ["sweep", "scenes_small_finetune", "--grid", "seed=1", "--init", "nowhere"],
            "holds no run or model",
        ),
        (["status", "nowhere"], "holds no jobs.json"),
        (["resume", "nowhere"], "holds no jobs.json"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    local = ["--cluster", "local"] if arguments[0] in ("pipeline", "sweep") else []
    assert main([*arguments, *local]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_dry_run_prints_the_scripts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from d2s.launchers import jobs, submit

    if not submit.shutil.which("sbatch"):
        monkeypatch.setattr(submit.shutil, "which", lambda name: f"/usr/bin/{name}")
        monkeypatch.setattr(jobs.submitit.SlurmExecutor, "affinity", classmethod(lambda cls: 2))
    (tmp_path / "launchers").symlink_to(Path(__file__).parents[2] / "launchers")
    monkeypatch.chdir(tmp_path)
    assert main(["pipeline", "--cluster", "slurm", "--nodes", "2", "--tasks", "8", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "#SBATCH --gres=gpu:8" in text
    assert "#SBATCH --dependency=" in text
    assert "#SBATCH --signal=USR2@120" in text
    assert "--kill-on-bad-exit=1" in text
    assert '"train", "scenes_small_finetune"' in text
    assert not (tmp_path / "runs").exists()


def test_grid_in_the_order_of_its_fields() -> None:
    assert grid_points(["a=1,2", "b=x,y"]) == [
        {"a": "1", "b": "x"}, {"a": "1", "b": "y"}, {"a": "2", "b": "x"}, {"a": "2", "b": "y"},
    ]  # fmt: skip
    with pytest.raises(ValueError, match="given twice"):
        grid_points(["a=1", "a=2"])
