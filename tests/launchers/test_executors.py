"""What is asked of sbatch and of submitit's local executor, with stand-ins for SLURM's programs."""

import json
import subprocess
from pathlib import Path

import pytest
from programs import ROOT, Programs, clone

from d2s.launchers import submit
from d2s.launchers.executors import Resources, Step, executor
from d2s.launchers.pipeline import Source, sweep
from d2s.launchers.submit import is_last_word, main

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
    found.add("scontrol", "exit 1")
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
    monkeypatch.setattr(submit.torch.cuda, "device_count", lambda: 2)
    assert main(here) == 2
    assert "--tasks 3: this machine shows 2 GPUs" in capsys.readouterr().err
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1f")
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES is 'GPU-1f': --cluster local takes numbers"):
        executor(tmp_path, Step("train", [[]], wide=True), Resources(cluster="local"), [])


def test_sweep_from_a_run_takes_the_data_it_is_given(tmp_path: Path) -> None:
    """And what is built is what is trained on; without either it takes the run's own, and builds nothing."""
    (tmp_path / "config.json").touch()
    grid = ["scenes_small_finetune", tmp_path, tmp_path / "out", ["optim.lr=1e-4"], []]
    recipe, *rest = grid
    built = Source(data=tmp_path / "data", build=("--source", "scenes"))
    for found, names in ((built, ["shards", "train"]), (Source(data=tmp_path / "data"), ["train"])):
        steps, _ = sweep(recipe, found, *rest)
        assert [step.name for step in steps] == names
        command = steps[-1].commands[0]
        assert command[command.index("--data") + 1] == str(tmp_path / "data")
    steps, _ = sweep(recipe, None, *rest)
    assert [step.name for step in steps] == ["train"]
    assert "--data" not in steps[0].commands[0]
    with pytest.raises(ValueError, match="scenes_small_pretrain starts from no other run"):
        sweep("scenes_small_pretrain", built, *rest)


def test_sweep_from_a_run_builds_nothing_unasked(programs: Programs, capsys: pytest.CaptureFixture) -> None:
    Path("init").mkdir()
    Path("init/config.json").touch()
    sweep = ["sweep", "scenes_small_finetune", "--init", "init", "--grid", "optim.lr=1e-4", "--dry-run"]
    assert main([*sweep, "--cluster", "slurm"]) == 0
    text = capsys.readouterr().out
    assert '"--init", "init"' in text
    assert '"shard"' not in text


def test_logs_of_a_job_that_has_not_started(programs: Programs, capsys: pytest.CaptureFixture) -> None:
    programs.add("scontrol", 'echo "JobId=$4 JobState=PENDING"')
    assert main(PIPELINE) == 0
    capsys.readouterr()
    assert main(["logs", "runs/p", "finetune", "--rank", "3"]) == 2
    assert capsys.readouterr().err == "error: nothing was printed yet as rank 3: finetune is PENDING\n"
    assert main(["logs", "runs/p"]) == 2
    assert "shards is PENDING, pretrain is PENDING" in capsys.readouterr().err


def test_last_words() -> None:
    assert is_last_word("train.py: error: --data is missing")
    assert is_last_word("[rank1]: torch.OutOfMemoryError: CUDA out of memory.")
    assert is_last_word("AssertionError")
    assert not is_last_word("srun: error: n0: task 0: Exited with exit code 1")
    assert not is_last_word("RuntimeError: train ended with code 1: see the lines above")
    assert not is_last_word('    raise ValueError("x")')


def test_lines_of_the_readme_wait_for_each_other(programs: Programs) -> None:
    block = (ROOT / "README.md").read_text().partition("## On a cluster")[2].split("```")[1]
    lines = [line for line in block.splitlines() if "sbatch -" in line]
    programs.add("sbatch", 'grep -c . "$(dirname "$0")/calls"')
    environment = {**programs.environment, "D2S_GPU": "gpu:h100"}
    subprocess.run(["bash", "-c", "\n".join(lines)], env=environment, check=True, timeout=60)
    shards, pretrain, finetune, evaluate = programs.calls("sbatch")
    assert "--wait" in shards
    assert "--gres=gpu:h100:8 launchers/pretrain.slurm" in pretrain
    assert "--gres=gpu:h100:8 --dependency=afterok:2 launchers/finetune.slurm" in finetune
    assert "--gres=gpu:h100:1 --dependency=afterok:3 launchers/evaluate.slurm" in evaluate
