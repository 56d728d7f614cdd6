"""The states of jobs, from what SLURM's programs print or fail to print, and from local processes."""

import subprocess
import sys
from pathlib import Path

import pytest
from programs import Programs
from submitit.core.utils import cloudpickle_dump

from d2s.launchers import jobs as jobs_module
from d2s.launchers.executors import Resources, Step
from d2s.launchers.jobs import Jobs
from d2s.launchers.states import ENDED, LOGS, local_controller, slurm_states

FORGOTTEN = 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1'
SILENT = 'echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1'


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    found = Programs(tmp_path / "bin")
    monkeypatch.setenv("PATH", found.environment["PATH"])
    found.add("squeue", SILENT)
    found.add("sacct", "exit 1")
    return found


def finish(folder: Path, number: str, outcome: str) -> None:
    """The result that one task leaves."""
    (folder / LOGS).mkdir(exist_ok=True)
    cloudpickle_dump((outcome, 0), folder / LOGS / f"{number}_0_result.pkl")


def test_silence_is_no_failure(programs: Programs, tmp_path: Path) -> None:
    assert slurm_states(["7"], tmp_path) == ["UNKNOWN"]
    chain = Jobs(tmp_path, Resources(), [Step("train", [["train"]], ids=["7"])])
    with pytest.raises(ValueError, match="train: SLURM does not say what became of it"):
        chain.reset_unsuccessful()
    # A job that the controller has forgotten has ended; its results tell how.
    programs.add("squeue", FORGOTTEN)
    assert slurm_states(["7"], tmp_path) == ["FAILED"]
    finish(tmp_path, "7", "success")
    assert slurm_states(["7"], tmp_path) == ["COMPLETED"]


def test_accounting_knows_what_the_controller_does_not(programs: Programs, tmp_path: Path) -> None:
    programs.add("sacct", 'echo "7|CANCELLED by 1000"')
    assert slurm_states(["7"], tmp_path) == ["CANCELLED"]


def test_one_query_for_a_whole_array(programs: Programs, tmp_path: Path) -> None:
    programs.add(
        "squeue", "\n".join(f'echo "7_{i} {state}"' for i, state in ((0, "RUNNING"), (2, "PENDING")))
    )
    programs.add("sacct", 'echo "7_1|COMPLETED"')
    assert slurm_states(["7_0", "7_1", "7_2"], tmp_path) == ["RUNNING", "COMPLETED", "PENDING"]
    assert [call.split()[-1] for call in programs.calls("squeue")] == ["7"]


@pytest.mark.parametrize("state", ["PREEMPTED", "REVOKED"])
def test_wait_ends_with_every_state_that_ends_a_job(
    state: str, programs: Programs, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    programs.add("squeue", f'echo "7 {state}"')
    assert not Jobs(tmp_path, Resources(), [Step("train", [["train"]], ids=["7"])]).wait()
    assert capsys.readouterr().out == f"train      {state}\n"
    assert state in ENDED


def test_wait_outlasts_a_silent_controller(
    programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        programs.add("squeue", 'echo "7 COMPLETED"')

    monkeypatch.setattr(jobs_module.time, "sleep", sleep)
    assert Jobs(tmp_path, Resources(), [Step("train", [["train"]], ids=["7"])]).wait()
    assert capsys.readouterr().out.split() == ["train", "UNKNOWN", "train", "COMPLETED"]
    assert max(pauses) == 2.0  # those of subprocess are shorter


def local(folder: Path, pid: int) -> Jobs:
    """Jobs of this machine of which one is written down as running."""
    step = Step("train", [["train"]], ids=["1", str(pid)], state="RUNNING")
    chain = Jobs(folder, Resources(cluster="local"), [step])
    chain.save()
    return chain


def test_local_run_whose_command_was_killed_is_resumed(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as gone:
        pass
    chain = local(tmp_path, gone.pid)
    assert chain.states(chain.steps[0]) == ["FAILED"]
    assert chain.reset_unsuccessful() == 1


def test_cancel_here_ends_the_controller_and_no_other_process(tmp_path: Path) -> None:
    """The first number belongs to nobody; that of a stranger is not a controller's."""
    for name, ends in (("submitit", True), ("stranger", False)):
        # As a script's background job has it: INT is ignored.
        code = "import signal, time; signal.signal(2, signal.SIG_IGN); print(flush=True); time.sleep(60)"
        with subprocess.Popen([sys.executable, "-c", code, name], stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            assert bool(local_controller(str(process.pid))) == ends
            local(tmp_path, process.pid).cancel()
            if ends:
                process.wait(timeout=20)
            assert (process.poll() is not None) == ends
            process.kill()
        assert Jobs.load(tmp_path).steps[0].state == "CANCELLED"


def test_local_steps_behind_a_failed_one_are_not_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    steps = [Step("pretrain", [["train"]], state="FAILED"), Step("finetune", [["train"]])]
    assert not Jobs(tmp_path, Resources(cluster="local"), steps).wait()
    assert capsys.readouterr().out.split() == ["pretrain", "FAILED", "finetune", "PENDING"]


def test_local_job_that_submitit_gives_up_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """submitit's controller starts a job six times; a training that needs more has not failed."""
    number = iter("345")

    def start(self: Jobs, step: Step, arguments: list[str]) -> str:
        this = next(number)
        finish(tmp_path, this, "success")
        if this != "5":
            (tmp_path / LOGS / f"{this}_0_result.pkl").unlink()
            (tmp_path / LOGS / f"{this}_requeue").touch()
        return this

    monkeypatch.setattr(Jobs, "_run_job", start)
    chain = Jobs(tmp_path, Resources(cluster="local"), [Step("train", [["train", "r"]])])
    chain.run_locally()
    assert chain.steps[0].state == "COMPLETED"
    again = "train: ran out of time, goes on from its checkpoint"
    assert capsys.readouterr().out.splitlines() == ["train: train r", again, again]
