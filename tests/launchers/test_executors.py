"""What is asked of sbatch and of submitit's local executor, with stand-ins for SLURM's programs."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from programs import ROOT, Programs, clone

from d2s.launchers import executors, task
from d2s.launchers.executors import Command, Resources, Step, executor
from d2s.launchers.pipeline import find_data, sweep
from d2s.launchers.show import is_error_message
from d2s.launchers.states import requeue_file
from d2s.launchers.submit import main

PIPELINE = ["pipeline", "--cluster", "slurm", "--out", "runs/p", "--no-wait"]
# Numbers every job, and keeps its script and the variables that sbatch reads.
SBATCH = """
number=$(wc -l < "$(dirname "$0")/calls")
cp "$1" "script-$number"
env | grep ^SBATCH_ | sort > "variables-$number"
echo "Submitted batch job $number"
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    found = Programs(tmp_path / "bin")
    monkeypatch.setenv("PATH", found.environment["PATH"])
    for name in ("srun", "scancel"):
        found.add(name)
    found.add("sbatch", SBATCH)
    found.add("squeue", "exit 1")
    found.add("sacct", "exit 1")
    monkeypatch.chdir(clone(tmp_path / "project"))
    return found


def test_each_job_gets_the_gpus_it_asks_for(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a site's variables say; the name of GPUs is a variable of the project's own."""
    monkeypatch.setenv("SBATCH_GRES", "gpu:h100:8")
    monkeypatch.setenv("SBATCH_ACCOUNT", "")  # set by the call below, to be taken back after the test
    Path("launchers/site.env").write_text("SBATCH_GRES=gpu:a:8\nSBATCH_ACCOUNT=me\nD2S_GPU=gpu:h100\n")
    assert main([*PIPELINE, "--tasks", "2"]) == 0
    lines = [
        [line for line in Path(f"script-{number}").read_text().splitlines() if "--gres" in line]
        for number in range(1, 5)
    ]
    wide = ["#SBATCH --gres=gpu:h100:2"]
    assert lines == [[], wide, wide, ["#SBATCH --gres=gpu:h100:1"]]
    assert Path("variables-1").read_text() == "SBATCH_ACCOUNT=me\n"


def test_a_refusal_is_one_line_and_the_folder_can_be_used_again(
    programs: Programs, capsys: pytest.CaptureFixture
) -> None:
    refuse = "[ -f script-1 ] && { echo 'sbatch: error: x' >&2; echo 'sbatch: error: Bad time' >&2; exit 1; }"
    programs.add("sbatch", refuse + SBATCH)
    sweep = ["sweep", "scenes_small_finetune", "--grid", "optim.lr=1e-4,2e-4", *PIPELINE[1:]]
    assert main(sweep) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: sbatch refused pretrain: sbatch: error: Bad time; nothing is queued")
    assert told.count("\n") == 1
    assert programs.calls("scancel") == ["1"]
    assert len(json.loads(Path("runs/p/grid.json").read_text())) == 2
    Path("script-1").unlink()
    programs.add("sbatch", SBATCH)
    assert main(["resume", "runs/p", "--minutes", "7", "--nodes", "3", "--no-wait"]) == 0
    scripts = [path.read_text() for path in sorted(Path().glob("script-*"))]
    assert len(scripts) == 3
    assert all("#SBATCH --time=7\n" in script for script in scripts)
    assert ["#SBATCH --nodes=3\n" in script for script in scripts] == [False, True, True]
    assert "--array=0-1" in scripts[2]
    assert main(["resume", "runs/p", "--minutes", "1"]) == 2


@pytest.mark.parametrize("outer, seen", [(None, "0,1"), ("3,5,7", "3,5"), ("", ""), ("6", "6")])
def test_local_jobs_see_the_gpus(
    outer: str | None, seen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import submitit.local.local as local

    told: list[str] = []
    monkeypatch.setattr(local, "start_controller", lambda **names: told.append(names["cuda_devices"]))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if outer is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", outer)
    here = Resources(cluster="local", tasks=2)
    for step, resources in (
        (Step("train", [[]], wide=True), here),
        (Step("shards", [[]]), here),
        (Step("train", [[]], wide=True), Resources(cluster="local", tasks=2, gpus=False)),
    ):
        with pytest.raises(AttributeError):  # there is no process: it was not started
            executor(tmp_path, step, resources, []).submit(print)
    assert told == [seen, "", ""]


def test_local_jobs_need_a_gpu_each_by_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    here = ["pipeline", "--cluster", "local", "--tasks", "3"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert main(here) == 2
    assert "--tasks 3: this machine shows 2 GPUs" in capsys.readouterr().err
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1f")
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES is 'GPU-1f': --cluster local takes numbers"):
        executor(tmp_path, Step("train", [[]], wide=True), Resources(cluster="local"), [])


def test_sweep_from_a_run_takes_the_data_it_is_given(tmp_path: Path) -> None:
    """The data set that a step before it builds, too; without any it takes the run's own."""
    (tmp_path / "config.json").touch()
    data, build = find_data("scenes_small_finetune", None, [], tmp_path, 1)
    for given, steps, names in (
        (data, build, ["shards", "train"]),
        (data, [], ["train"]),
        (None, [], ["train"]),
    ):
        found = sweep("scenes_small_finetune", given, steps, tmp_path, tmp_path, [{"optim.lr": "1e-4"}], [])
        assert [step.name for step in found] == names
        command = found[-1].commands[0]
        assert ("--data" in command) == bool(given)
        assert given is None or command[command.index("--data") + 1] == str(tmp_path / "data")
    with pytest.raises(ValueError, match="scenes_small_pretrain starts from no other run"):
        sweep("scenes_small_pretrain", data, build, tmp_path, tmp_path, [{"optim.lr": "1e-4"}], [])


@pytest.mark.parametrize("rank", ["0", "1"])
def test_local_job_asks_for_a_restart(rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a file beside its results, with submitit's own exit code; a file of the previous start is removed."""
    file = requeue_file(tmp_path, "7")
    file.touch()
    existed: list[bool] = []
    left: list[int] = []

    def run_command(arguments: list[str]) -> task.ExitStatus:
        existed.append(file.exists())
        return task.ExitStatus(75, requeue=True)

    def leave(code: int, *, ordered: bool) -> None:
        left.append(code)
        raise SystemExit

    monkeypatch.setattr(task, "run_command", run_command)
    monkeypatch.setattr(executors, "leave_group", leave)
    for name, text in {
        "SUBMITIT_EXECUTOR": "local", "SUBMITIT_FOLDER": str(tmp_path), "SUBMITIT_LOCAL_JOB_ID": "7",
        "SUBMITIT_LOCAL_GLOBALID": rank, "RANK": rank, "D2S_REQUEUE": "",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, text)
    with pytest.raises(SystemExit):
        Command(["train", "r"])()
    assert existed == [rank == "1"]
    assert file.exists()
    assert left == [144]


def test_sweep_from_a_run_builds_nothing_unasked(programs: Programs, capsys: pytest.CaptureFixture) -> None:
    Path("init").mkdir()
    Path("init/config.json").touch()
    sweep = ["sweep", "scenes_small_finetune", "--init", "init", "--grid", "optim.lr=1e-4", "--dry-run"]
    assert main([*sweep, "--cluster", "slurm"]) == 0
    text = capsys.readouterr().out
    assert '"--init", "init"' in text
    assert '"shard"' not in text


def test_logs_of_a_job_that_has_not_started(programs: Programs, capsys: pytest.CaptureFixture) -> None:
    programs.add("squeue", 'echo "${@: -1} PENDING"')
    assert main(PIPELINE) == 0
    capsys.readouterr()
    assert main(["logs", "runs/p", "finetune", "--rank", "3"]) == 2
    assert capsys.readouterr().err == "error: nothing was printed yet as rank 3: finetune is PENDING\n"
    assert main(["logs", "runs/p"]) == 2
    assert "shards is PENDING, pretrain is PENDING" in capsys.readouterr().err


def test_error_messages_are_found() -> None:
    assert is_error_message("train.py: error: --data is missing")
    assert is_error_message("[rank1]: torch.OutOfMemoryError: CUDA out of memory.")
    assert is_error_message("AssertionError")
    assert not is_error_message("srun: error: n0: task 0: Exited with exit code 1")
    assert not is_error_message("RuntimeError: train ended with code 1: see the lines above")
    assert not is_error_message('    raise ValueError("x")')


def test_lines_of_the_readme_wait_for_each_other(programs: Programs) -> None:
    block = (ROOT / "launchers/README.md").read_text().split("```text")[1].split("```")[0]
    lines = [line for line in block.splitlines() if "sbatch -" in line]
    programs.add("sbatch", 'grep -c . "$(dirname "$0")/calls"')
    environment = {**programs.environment, "D2S_GPU": "gpu:h100"}
    subprocess.run(["bash", "-c", "\n".join(lines)], env=environment, check=True, timeout=60)
    shards, pretrain, finetune, evaluate = programs.calls("sbatch")
    assert "--wait" in shards
    assert "--gres=gpu:h100:8 launchers/pretrain.slurm" in pretrain
    assert "--gres=gpu:h100:8 --dependency=afterok:2 launchers/finetune.slurm" in finetune
    assert "--gres=gpu:h100:1 --dependency=afterok:3 launchers/evaluate.slurm" in evaluate
