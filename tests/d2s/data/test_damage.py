"""Damaged samples and cut captions count once: over workers, over restarts, over a step that is made again."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from step_trainer import trainer
from torch import nn
from worker_cases import run

from d2s.checkpoint import store as checkpoint
from d2s.data.damage import Damage, add_new
from d2s.shards.read.records import DamagedSample
from d2s.training.trainer import Trainer
from d2s.workers.preemption import Preempted


def line(row: int, reason: str = "crc32 is 1, the index says 2") -> str:
    return str(DamagedSample("train/00001.tar", f"key k{row:04d} (row {row})", reason))


def test_a_sample_that_fails_in_another_way_each_time_is_one() -> None:
    known: list[str] = []
    add_new(known, [line(4), line(4, "crc32 is 9, the index says 2"), line(44)])
    add_new(
        known, [line(44, "cannot be read: Input/output error"), "s3://a.tar: OSError: x", "s3://a.tar: y"]
    )
    assert known == [line(4), line(44), "s3://a.tar: OSError: x", "s3://a.tar: y"]


def counted(made: Trainer) -> tuple[int, int]:
    return made.state.count_over_workers(made.workers, made.config.data.damage_budget)


def _two_meet_the_same() -> dict:
    rank = dist.get_rank()
    made = trainer(nn.Linear(1, 1), damage_budget=3)
    made.state.truncated = rank + 1
    counts = []
    for rows in ([1, 2], [2, 3], [3]):  # every worker meets those, worker 1 one more in the end
        add_new(made.batches.damaged, [line(row, f"seen by {rank}") for row in rows])
        counts.append(counted(made))
    add_new(made.batches.damaged, [line(4)] * rank)
    try:
        counted(made)
    except ValueError as error:
        counts.append(str(error))
    every = [None, None]
    dist.all_gather_object(every, (counts, made.batches.damaged))
    return {"workers": every}


@pytest.mark.dist
def test_a_sample_that_several_workers_meet_is_one(tmp_path: Path) -> None:
    first, second = run(_two_meet_the_same, 2, tmp_path)["workers"]
    assert first == second
    counts, known = first
    assert counts[:3] == [(2, 3), (3, 3), (3, 3)]
    assert (
        "data.damage_budget is 3 but 4 samples are damaged, the last: train/00001.tar: key k0004" in counts[3]
    )
    assert known == [line(row, "seen by 0") for row in (1, 2, 3)] + [line(4)]


def test_a_sample_met_again_after_a_restart_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = (trainer(nn.Linear(1, 1)) for _ in range(2))
    add_new(before.batches.damaged, [line(1), line(2)])
    before.state.truncated = 5
    state = before.state.to_dict(before.workers, 9)
    assert (state["damaged"], state["truncated"]) == (2, 5)
    monkeypatch.setattr(checkpoint, "load", lambda *arguments: state)
    after.restore()
    add_new(after.batches.damaged, [line(2, "cannot be read"), line(3)])
    assert after.state.damage.new_lines() == [line(3)]
    assert counted(after) == (3, 5)
    # A checkpoint of an earlier version has their number only.
    monkeypatch.setattr(checkpoint, "load", lambda *arguments: {**state, "damaged_samples": []})
    after.restore()
    assert counted(after) == (0, 5)


def test_what_one_worker_was_told_of_it_does_not_say() -> None:
    damage = Damage([])
    damage.known.append(line(1))
    assert damage.new_lines() == [line(1)]
    damage.share()
    assert (damage.new_lines(), damage.unshared) == ([], 0)


def test_the_cut_captions_of_a_step_that_a_signal_ended_are_not_counted() -> None:
    made = trainer(nn.Linear(1, 1))
    batch = SimpleNamespace(rows=torch.ones(2, 1), factor=1.0, slope=1.0, truncated=7)

    def signalled() -> None:
        raise Preempted("SIGUSR2")

    handle = made.engine.module.register_forward_hook(lambda *arguments: signalled())
    with pytest.raises(Preempted):
        made.train_step(batch)
    assert counted(made) == (0, 0)
    handle.remove()
    made.engine.module.register_forward_hook(lambda module, inputs, out: out.sum())
    made.train_step(batch)  # as the resumed run makes it again
    assert counted(made) == (0, 7)
