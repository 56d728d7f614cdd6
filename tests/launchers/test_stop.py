"""launchers/stop.py, and what cannot read it: the sbatch scripts and job.sh."""

import re
import signal
from pathlib import Path

import pytest
from programs import ROOT

from d2s.launchers import executors
from d2s.launchers.executors import Resources, Step
from d2s.launchers.stop import LEAD_SECONDS, SIGNAL
from d2s.workers.preemption import PREEMPTED, SIGNALS

SCRIPTS = sorted((ROOT / "launchers").glob("*.slurm"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_that_train_ask_for_the_signal(path: Path) -> None:
    text = path.read_text()
    asked = re.findall(r"^#SBATCH --signal=(.*)$", text, re.MULTILINE)
    assert asked == ([f"{SIGNAL}@{LEAD_SECONDS}"] if "tasks train" in text else [])


def test_a_training_reacts_to_the_signal() -> None:
    assert signal.Signals[f"SIG{SIGNAL}"] in SIGNALS


def test_job_script_knows_the_exit_code() -> None:
    text = (ROOT / "launchers/job.sh").read_text()
    assert re.findall(r"^preempted=(\d+)$", text, re.MULTILINE) == [str(PREEMPTED)]


def test_executors_send_the_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the user's environment names another one for submitit."""
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "USR1")
    monkeypatch.setattr(executors.submitit.SlurmExecutor, "affinity", classmethod(lambda cls: 2))
    step = Step("train", [["train", "r"]], wide=True)
    assert f"#SBATCH --signal={SIGNAL}@{LEAD_SECONDS}\n" in executors.preview(tmp_path, step, Resources())
    local = executors.executor(tmp_path, step, Resources(cluster="local"), [])
    assert local.parameters["signal_delay_s"] == LEAD_SECONDS
    assert executors.os.environ["SUBMITIT_PREEMPT_SIGNAL"] == SIGNAL
