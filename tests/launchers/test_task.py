"""What a rank does with SLURM's variables, its arguments and signals."""

import os
import signal
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from d2s.launchers import task
from d2s.launchers.task import ExitStatus, fill_in_seed, rank_variables, resume_after_requeue, tasks_per_node
from d2s.workers.preemption import PREEMPTED, SIGNALS, Preemption

TASK = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "7",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_TASKS_PER_NODE": "2(x3),1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "20007",
}


def test_ranks_are_named_as_torch_names_them() -> None:
    assert rank_variables(TASK) == {
        "RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    }  # fmt: skip


@pytest.mark.parametrize("name", task.COMMANDS)
def test_every_command_is_there(name: str) -> None:
    assert callable(import_module(task.COMMANDS[name]).main)


def test_local_tasks_meet_at_a_port_of_their_job() -> None:
    local = {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_GLOBALID": "1", "SUBMITIT_LOCAL_NTASKS": "2",
             "SUBMITIT_LOCAL_LOCALID": "1", "SUBMITIT_LOCAL_JOB_ID": "41234"}  # fmt: skip
    found = rank_variables({**TASK, **local})
    assert (found["RANK"], found["WORLD_SIZE"]) == ("1", "2")
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("127.0.0.1", "21234")


@pytest.mark.parametrize("name", ["SLURM_PROCID", "MASTER_ADDR"])
def test_without_srun_the_error_says_what_is_missing(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is not set: start this with srun"):
        rank_variables({key: value for key, value in TASK.items() if key != name})


def test_short_form_of_tasks_per_node() -> None:
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("8") == [8]


def test_a_later_start_resumes_a_training_and_nothing_else() -> None:
    again = {"SLURM_RESTART_COUNT": "1"}
    assert resume_after_requeue(["train", "r"], {}) == ["train", "r"]
    assert resume_after_requeue(["train", "r"], again) == ["train", "r", "--resume"]
    assert resume_after_requeue(["train", "r", "--resume"], again) == ["train", "r", "--resume"]
    assert resume_after_requeue(["evaluate"], again) == ["evaluate"]


def test_seed_of_an_array() -> None:
    array = {"SLURM_ARRAY_TASK_ID": "3"}
    given = ["train", "r", "--run", "runs/x-{seed}", "--seed", "{seed}"]
    assert fill_in_seed(given, array) == ["train", "r", "--run", "runs/x-3", "--seed", "3"]
    with pytest.raises(ValueError, match="would write into one run"):
        fill_in_seed(["train", "r", "--run", "runs/x"], array)
    assert fill_in_seed(["train", "r", "--run", "x"], {**array, "SUBMITIT_EXECUTOR": "slurm"})[-1] == "x"
    with pytest.raises(ValueError, match="use sbatch --array"):
        fill_in_seed(given, {})


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ExitStatus]]:
    """Runs a training that gets these signals and stops with PREEMPTED."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}

    def start(*numbers: signal.Signals) -> ExitStatus:
        def main(arguments: list[str], preemption: Preemption) -> int:
            for number in numbers:
                os.kill(os.getpid(), number)
            return PREEMPTED

        monkeypatch.setattr(task, "import_module", lambda name: SimpleNamespace(main=main))
        return task.run_command(["train", "r"], dict(TASK))

    yield start
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_after_term_there_is_no_requeue(train: Callable[..., ExitStatus]) -> None:
    """Not even if it comes while the ranks write the checkpoint that another signal asked for."""
    usr1, usr2, term = SIGNALS
    assert train(usr2) == ExitStatus(PREEMPTED, requeue=True)
    assert train(usr1) == ExitStatus(PREEMPTED, requeue=True)
    assert train(term) == ExitStatus(PREEMPTED)
    assert train(usr2, term) == ExitStatus(PREEMPTED)
    assert train(term, usr1) == ExitStatus(PREEMPTED)


def test_rank_0_asks_for_a_requeue(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    environment = {"RANK": "1", "D2S_REQUEUE": str(tmp_path / "asked")}
    task.request_requeue(environment)
    assert not (tmp_path / "asked").exists()
    task.request_requeue({**environment, "RANK": "0"})
    assert (tmp_path / "asked").exists()
    for missing in ({}, {"D2S_REQUEUE": str(tmp_path / "nowhere/asked")}):
        task.request_requeue({"RANK": "0", **missing})
        assert "submit the job again, with --resume" in capsys.readouterr().err
