"""Before the first step and between steps: what a start finds, what an interrupt leaves, and who decides."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from step_trainer import trainer
from torch import nn
from worker_cases import run

import d2s.prepare
from d2s import run_folder
from d2s.distributed import Workers
from d2s.prepare import Plan
from d2s.train import main


def planned(run: Path, resume_from: Path | None = None, world: int = 1) -> Plan:
    config = SimpleNamespace(max_steps=5, log=SimpleNamespace(max_stalled_restarts=3))
    return Plan(
        config=config, data="", index=None, run=run, init=None, resume=True, resume_from=resume_from, world=world
    )  # fmt: skip


def join() -> Workers:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return Workers(rank=rank, world=world, local_rank=rank, device=torch.device("cpu"))


def test_ctrl_c_before_the_first_step_is_one_line_and_no_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    seen = []

    def interrupted(self: Plan, *arguments: object) -> None:
        seen.append(json.loads((self.run / "restarts.json").read_text())["starts"])
        raise KeyboardInterrupt

    monkeypatch.setattr(d2s.prepare, "start_workers", join)
    monkeypatch.setattr(d2s.prepare, "plan", lambda options, overrides: planned(tmp_path))
    monkeypatch.setattr(Plan, "_build", interrupted)
    for _ in range(5):
        assert main(["scenes_small_pretrain", "--resume"]) == 130
    assert seen == [1] * 5
    assert not (tmp_path / "restarts.json").exists()
    lines = capfd.readouterr().err.strip().splitlines()
    assert lines == ["train.py: error: interrupted before the first step"] * 5


def test_what_a_kill_leaves_of_a_first_write_is_no_run(tmp_path: Path) -> None:
    for name in (".config.json.tmp", ".restarts.json.tmp", ".lock", "restarts.json"):
        (tmp_path / name).write_text("{")
    for resume in (True, False):
        assert run_folder.check_run(tmp_path, None, {}, resume=resume) is None
    (tmp_path / "metrics.tmp").write_text("")
    with pytest.raises(ValueError, match="holds no run"):
        run_folder.check_run(tmp_path, None, {}, resume=True)


def _see_different_folders(folder: str) -> dict:
    rank, run_at = dist.get_rank(), Path(folder)
    d2s.prepare.start_workers = join

    def build(self: Plan, workers: Workers, preemption: object, lock: int | None) -> Path | None:
        if lock is not None:
            os.close(lock)
        return self.resume_from

    Plan._build = build
    # Worker 0 sees a run that is done; worker 1 an older checkpoint, or none.
    newest = run_at / "checkpoints" / "step-00000005"
    preemption = SimpleNamespace(check=lambda: None)
    found = []
    for other in (run_at / "checkpoints" / "step-00000004", None):
        found.append(planned(run_at, newest if rank == 0 else other, 2).start(preemption).name)
    every = [None, None]
    dist.all_gather_object(every, found)
    return {"workers": every}


@pytest.mark.dist
def test_all_workers_resume_what_the_first_one_found(tmp_path: Path) -> None:
    (tmp_path / "run" / "last").mkdir(parents=True)
    first, second = run(_see_different_folders, 2, tmp_path, str(tmp_path / "run"))["workers"]
    assert first == second == ["step-00000005"] * 2


def _score_differently() -> dict:
    rank, exported = dist.get_rank(), []
    made = trainer(nn.Linear(1, 1))
    made.whole = SimpleNamespace(full=lambda: torch.no_grad())
    made.workers = join()
    made.log = SimpleNamespace(row=lambda *arguments: None, say=lambda text: None)
    made.batches.steps_per_epoch = 1
    made.config.stage = "finetune"
    for step, scores in enumerate([(10.0, 20.0), (15.0, 15.0), (12.0, 30.0)]):
        made.step = step
        result = SimpleNamespace(rsum=scores[rank], to_dict=dict)
        made._evaluate = lambda model, result=result: result
        made._export = lambda name: exported.append(made.step)
        made._validate()
    every = [None, None]
    dist.all_gather_object(every, (exported, made.best))
    return {"workers": every}


@pytest.mark.dist
def test_all_workers_export_what_the_first_one_finds_best(tmp_path: Path) -> None:
    first, second = run(_score_differently, 2, tmp_path)["workers"]
    assert first == second == ([0, 1], {"rsum": 15.0, "step": 1})
