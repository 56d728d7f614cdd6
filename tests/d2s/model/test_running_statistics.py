"""Running statistics: a skipped step leaves no trace in them, and workers that compute them apart save one model."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from step_trainer import trainer
from torch import nn
from worker_cases import run

from d2s.checkpoint.full_model import FullModel
from d2s.checkpoint.store import load, save
from d2s.model.batch_norm import MapBatchNorm, WordBatchNorm
from d2s.model.running_statistics import RunningStatistics
from d2s.workers.group import Workers

STATE = {"step": 1, "to_validate": False, "best": {}, "damaged": 0, "truncated": 0, "skipped": 0}


class Towers(nn.Module):
    """One norm of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.word, self.plain = MapBatchNorm(3), WordBatchNorm(3), nn.BatchNorm1d(3)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        words = self.plain(self.word(rows))
        return words.sum() + self.map(rows.view(*rows.shape, 1, 1)).sum()


def buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


@pytest.mark.parametrize("spoilt", ["activation", "loss", "gradient"])
def test_a_skipped_step_leaves_running_statistics_as_they_were(spoilt: str) -> None:
    torch.manual_seed(0)
    module = Towers().train()
    one = trainer(module)
    good = SimpleNamespace(rows=torch.randn(8, 3), factor=1.0, slope=1.0, truncated=0, samples=torch.zeros(0))
    one.train_step(good)
    old = buffers(module)
    rows = torch.randn(8, 3)
    if spoilt == "activation":
        rows[3, 1] = torch.inf
    changes = {"rows": rows, "factor": 1.0, "slope": 1.0}
    changes |= {"loss": {"factor": torch.nan}, "gradient": {"slope": torch.nan}}.get(spoilt, {})
    one.train_step(SimpleNamespace(**(vars(good) | changes)))
    assert one.state.skipped == 1
    assert all(torch.equal(buffer, old[name]) for name, buffer in module.named_buffers())


def test_a_variance_that_overflows_in_a_finite_step_is_not_followed() -> None:
    torch.manual_seed(0)
    module, alone = Towers().train(), Towers().train()
    statistics, rows = RunningStatistics(module), torch.randn(8, 3)
    alone(rows)
    rows[:, 1] *= 1e30
    statistics.snapshot()
    module(rows)
    assert not all(buffer.isfinite().all() for buffer in module.buffers())
    statistics.keep_finite()
    assert all(buffer.isfinite().all() for buffer in module.buffers())
    # The other channels have followed, to the bit.
    for name in ("running_mean", "running_var"):
        assert torch.equal(module.word.get_buffer(name)[::2], alone.word.get_buffer(name)[::2])


def _apart(folder: str) -> dict:
    """Two workers that compute statistics apart: what each evaluates, saves and finds again."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    module = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)).train()
    module(torch.randn(8, 3))
    engine = SimpleNamespace(module=module, optimizer=torch.optim.AdamW(module.parameters()), global_steps=0)
    workers = Workers(rank=rank, world=world, device=torch.device("cpu"))
    found = {"own": buffers(module)}
    save(Path(folder), 1, STATE, engine, workers, keep=1)
    found["after a save"] = buffers(module)
    module.train()(torch.randn(8, 3))
    found["moved on"] = buffers(module)
    with FullModel(module, 0).gathered() as model:
        found["evaluated"] = buffers(model)
    load(Path(folder), engine, workers)
    found["restored"] = buffers(module)
    every = [None] * world
    dist.all_gather_object(every, found)
    return {"workers": every}


@pytest.mark.dist
def test_workers_that_compute_statistics_apart_evaluate_and_save_one_model(tmp_path: Path) -> None:
    first, second = run(_apart, 2, tmp_path, str(tmp_path / "run"))["workers"]
    assert not torch.equal(first["own"]["1.running_mean"], second["own"]["1.running_mean"])
    assert not torch.equal(first["moved on"]["1.running_mean"], second["moved on"]["1.running_mean"])
    for name, own in first["own"].items():
        for worker in (first, second):
            assert torch.equal(worker["after a save"][name], own)
            assert torch.equal(worker["restored"][name], own)
            assert torch.equal(worker["evaluated"][name], first["moved on"][name])
