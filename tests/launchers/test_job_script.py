"""launchers/job.sh and the scripts that source it, with stand-ins for SLURM's programs."""

import subprocess
from pathlib import Path

import pytest
from programs import ROOT, Programs, clone

from d2s.launchers import executors
from d2s.launchers.executors import Resources, Step

JOB = {
    "SLURM_JOB_ID": "42",
    "SLURM_JOB_NAME": "d2s-pretrain",
    "SLURM_JOB_NODELIST": "n0",
    "D2S_ENV": "none",
}
SCONTROL = """
case $1 in
  show) [ "$2" = hostnames ] && echo n0 || echo "NodeAddr=10.0.0.1" ;;
  requeue) exit ${REFUSE:-0} ;;
esac
"""


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    found = Programs(tmp_path / "bin")
    found.add("scontrol", SCONTROL)
    found.add("srun")
    return found


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return clone(tmp_path / "project")


def script(programs: Programs, project: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess:
    """A job script, pretrain.slurm unless told otherwise, as the batch step of a job runs it."""
    return subprocess.run(
        ["bash", *(arguments or ["launchers/pretrain.slurm", "r"])], cwd=project, capture_output=True,
        text=True, timeout=60, env={**programs.environment, **JOB, "SLURM_SUBMIT_DIR": str(project), **more},
    )  # fmt: skip


def requeues(programs: Programs) -> list[str]:
    return [call for call in programs.calls("scontrol") if call.startswith("requeue")]


def test_the_script_requeues_if_rank_0_asked_for_it(programs: Programs, project: Path) -> None:
    """The script does, because a rank may run in a container without scontrol."""
    programs.add("srun", 'touch "$D2S_REQUEUE"; exit 75')
    done = script(programs, project)
    assert done.returncode == 75
    assert requeues(programs) == ["requeue 42"]
    assert not list(project.glob(".requeue*"))
    refused = script(programs, project, REFUSE="1")
    assert refused.returncode == 75
    assert "error: job 42 was not requeued" in refused.stderr
    assert "submit it again, with --resume" in refused.stderr


def test_without_the_file_there_is_no_requeue(programs: Programs, project: Path) -> None:
    (project / ".requeue-42").touch()  # of a start before this one
    programs.add("srun", "exit 75")
    assert script(programs, project).returncode == 75
    assert requeues(programs) == []


@pytest.mark.parametrize(
    "line",
    ["train.py: error: no", "torch.OutOfMemoryError: CUDA out of memory.", "ModuleNotFoundError: No module"],
)
def test_error_message_of_a_rank_is_copied(line: str, programs: Programs, project: Path) -> None:
    programs.add("srun", f'echo "{line}" > logs/d2s-pretrain-42/rank-3.log; exit 1')
    done = script(programs, project)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [line, "ended with code 1: see logs/d2s-pretrain-42"]


@pytest.mark.parametrize("path", sorted((ROOT / "launchers").glob("*.slurm")), ids=lambda path: path.stem)
def test_wrong_folder(path: Path, programs: Programs, tmp_path: Path) -> None:
    done = script(programs, tmp_path, str(path))
    assert done.returncode == 2
    assert f"error: {tmp_path} holds no launchers/job.sh: call sbatch in the project's folder" in done.stderr


def test_site_env_and_modules_may_use_unset_variables(programs: Programs, project: Path) -> None:
    (project / "launchers/site.env").write_text('NCCL_IB_HCA=$NOT_SET\nmodule() { echo "$NOT_SET" "$2"; }\n')
    done = script(programs, project, D2S_MODULES="cuda gcc")
    assert done.returncode == 0, done
    assert " cuda" in done.stdout
    (project / "launchers/site.env").write_text("module() { return 1; }\n")
    done = script(programs, project, D2S_MODULES="cuda gcc")
    assert done.returncode == 2
    assert "error: D2S_MODULES: module load cuda gcc failed" in done.stderr


def test_conda_may_use_unset_variables(programs: Programs, project: Path) -> None:
    programs.add("conda", """echo 'conda() { false; echo "active $NOT_SET $2"; }'""")
    done = script(programs, project, D2S_ENV="conda:d2s")
    assert done.returncode == 0, done
    assert "active  d2s" in done.stdout


def test_ranks_get_the_environment_and_the_site_its_options(programs: Programs, project: Path) -> None:
    programs.add("srun", 'echo "$SLURM_EXPORT_ENV $MASTER_ADDR"')
    done = script(programs, project, SLURM_EXPORT_ENV="NONE", D2S_SRUN_ARGS="--cpu-bind=cores --mpi=none")
    assert "ALL 10.0.0.1" in done.stdout
    assert "--cpu-bind=cores --mpi=none python3 -m d2s.launchers.task train r" in programs.calls("srun")[0]


def test_jobs_of_submit_run_through_the_same_script(
    programs: Programs, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The site's options of srun, the requeue; and no empty folder of logs beside submitit's own."""
    monkeypatch.setattr(executors.submitit.SlurmExecutor, "affinity", classmethod(lambda cls: 2))
    text = executors.preview(project / "runs", Step("pretrain", [["train", "r"]], wide=True), Resources())
    (project / "job").write_text(text)
    programs.add("srun", 'touch "$D2S_REQUEUE"; exit 75')
    done = script(programs, project, "job", D2S_SRUN_ARGS="--cpu-bind=cores")
    assert done.returncode == 75
    assert requeues(programs) == ["requeue 42"]
    assert "--cpu-bind=cores python3 -u -m submitit" in programs.calls("srun")[0]
    assert done.stdout == ""
    assert not (project / "logs").exists()
    programs.add("srun", "exit 3")
    done = script(programs, project, "job")
    assert (done.returncode, done.stderr) == (3, "ended with code 3\n")
