"""Pipelines and sweeps through submitit, on SLURM and on this machine, and what is refused before that."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from cluster import Cluster
from sbatch_runs import losses, paused, wait_for_step

from d2s.launchers.pipeline import grid_points
from d2s.launchers.submit import main

COMMAND = [sys.executable, "-m", "d2s.launchers.submit"]
TINY = [
    "--set", "max_steps=3", "--set", "batch_size=16", "--set", "data.loader_workers=0", "--cpus", "1",
]  # fmt: skip
BUILD = "--source scenes --count train=60,val=12,test=12"


def call(cluster: Cluster, project: Path, *arguments: str, code: int = 0) -> str:
    """Runs the command in this process, with the cluster's environment. Returns what it printed."""
    out = io.StringIO()
    with (
        mock.patch.dict(os.environ, cluster.environment, clear=True),
        contextlib.chdir(project),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
    ):
        assert main(list(arguments)) == code, out.getvalue()
    return out.getvalue()


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_pipeline_on_slurm(cluster: Cluster, project: Path) -> None:
    """With one restart of a job that the others wait for."""
    command = [*COMMAND, *"pipeline --cluster slurm --tasks 2 --out runs/p".split(), "--build", BUILD]
    command += [*TINY, "--set", "log.every=1", "--set", "max_steps=12"]
    run = project / "runs/p/pretrain"
    with subprocess.Popen(command, cwd=project, env=cluster.environment, stdout=-1, text=True) as pipeline:
        wait_for_step(run, 1)
        steps = json.loads((project / "runs/p/jobs.json").read_text())["steps"]
        [number] = [step["ids"][0] for step in steps if step["name"] == "pretrain"]
        with paused(project, number):
            cluster.call("scancel", "--signal=USR2", number)
        out, _ = pipeline.communicate(timeout=400)
    assert pipeline.returncode == 0, out
    for step in ("shards  job", "pretrain  job", "finetune  job", "evaluate  job"):
        assert f"`- {step}" in out
    assert "rSum" in out
    assert "sparse captions" in out
    assert (project / "runs/p/test.json").is_file()
    assert cluster.job(number)["Restarts"] == "1"
    assert max(losses(run)) == 12
    assert not list(project.glob(".requeue*"))
    assert call(cluster, project, "status", "runs/p").count("COMPLETED") == 4
    assert "done: 12 steps" in call(cluster, project, "logs", "runs/p", "finetune")
    assert "every job has succeeded" in call(cluster, project, "resume", "runs/p")


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sweep_on_slurm(cluster: Cluster, project: Path) -> None:
    out = call(
        cluster, project, "sweep", "scenes_small_pretrain", "--grid", "optim.lr=1e-4,2e-4", "--no-gpus",
        "--data", "data/scenes", "--out", "runs/s", *TINY,
    )  # fmt: skip
    rows = [line for line in out.splitlines() if "runs/s/run-" in line and "│" in line]
    assert len(rows) == 2
    assert all(f"runs/s/run-{i}" in row and " 3 " in row for i, row in enumerate(rows))
    assert "best" in out


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_failed_step_is_named_with_its_error(cluster: Cluster, project: Path) -> None:
    """The images are missing: the steps behind it never start, and `status` shows the failure."""
    rows = [
        {"path": f"{i}.png", "sparse": ["a dog"], "split": s} for i, s in enumerate(["train", "val", "test"])
    ]
    (project / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    build = "--source jsonl --captions rows.jsonl --images pictures"
    out = call(
        cluster, project, "pipeline", "--cluster", "slurm", "--build", build, "--out", "runs/f", "--no-gpus",
        *TINY, code=2,
    )  # fmt: skip
    assert "shards did not succeed" in out.replace("\n", " ")
    assert "pictures" in out
    assert "FAILED" in call(cluster, project, "status", "runs/f")


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_pipeline_here(tmp_path: Path) -> None:
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
    from d2s.launchers import executors, submit

    if not submit.shutil.which("sbatch"):
        monkeypatch.setattr(submit.shutil, "which", lambda name: f"/usr/bin/{name}")
        monkeypatch.setattr(executors.submitit.SlurmExecutor, "affinity", classmethod(lambda cls: 2))
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
