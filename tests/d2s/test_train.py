"""Training as a user runs it: both stages, resume after a kill, several workers, and mistakes in one line."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import torch
from safetensors.torch import load_file

from d2s.checkpoint.store import newest
from d2s.shards.cli import main as shard
from d2s.shards.format.manifest import read_manifest
from d2s.train import main
from d2s.training import run_folder
from d2s.training.config import RENAMED
from d2s.training.run_log import RunLog, read_rows

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    *("--batch_size", "8", "--model.width", "16", "--log.every", "1", "--validation.every_epochs", "1"),
    *("--data.loader_workers", "0", "--data.image_size", "32", "--model.image_size", "32"),
    *("--optim.warmup_steps", "0"),
]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 scenes to train on: six steps an epoch at a batch of 8."""
    out = tmp_path_factory.mktemp("train") / "scenes"
    assert shard(f"build --source scenes --count train=48,val=8,test=8 --size 32 --out {out}".split()) == 0
    return out


def train_by_command(
    *arguments: object, launcher: tuple[str, ...] = (sys.executable,)
) -> subprocess.CompletedProcess:
    """Runs the training script as a user does."""
    command = [*launcher, str(ROOT / "d2s" / "train.py"), *map(str, arguments), *SMALL]
    env = {**os.environ, "D2S_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=env, check=False)


def train(*arguments: object, workers: int = 1) -> subprocess.CompletedProcess:
    """The same in processes that are not new, without a launcher."""
    return forked.run("forked:train", [*map(str, arguments), *SMALL], workers=workers)


@pytest.fixture(scope="module")
def pretrained(scenes: Path) -> Path:
    """A stage-1 run of two epochs, never interrupted."""
    run = scenes.parent / "pretrain"
    done = train_by_command("scenes_small_pretrain", "--data", scenes, "--run", run, "--max_steps", 12)
    assert done.returncode == 0, done.stderr
    return run


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_rows(run) if row["kind"] == "train"]


@pytest.mark.slow
def test_both_stages_leave_a_usable_model(scenes: Path, pretrained: Path, tmp_path: Path) -> None:
    run = tmp_path / "finetune"
    # --data is that of the stage-1 run where it is not given.
    done = train("scenes_small_finetune", "--init", pretrained, "--run", run, "--max_steps", 6)
    assert done.returncode == 0, done.stderr
    assert (run / "teacher" / "dense.f32").stat().st_size == 48 * 16 * 4
    distill = [row["distill"] for row in read_rows(run) if row["kind"] == "train"]
    assert all(0 < value < 2 for value in distill)
    probe = (
        "import sys; from d2s import D2SModel\n"
        "for model in map(D2SModel.from_pretrained, sys.argv[1:]):\n"
        "    print(tuple(model.encode_text(['a red circle']).shape), 'deepspeed' in sys.modules)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", probe, str(run / "best"), str(run / "last")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    assert shown.stdout.splitlines() == ["(1, 16) False"] * 2


@pytest.mark.slow
def test_the_loss_falls_and_every_step_is_logged(pretrained: Path) -> None:
    rows = read_rows(pretrained)
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 13))
    assert [row["step"] for row in rows if row["kind"] == "val"] == [6, 12]
    assert sum(losses(pretrained)[-3:]) < sum(losses(pretrained)[:3])
    saved = json.loads((pretrained / "config.json").read_text())
    assert saved["config"]["optim"]["warmup_steps"] == 0
    assert list((pretrained / "tensorboard").iterdir())


@pytest.mark.slow
def test_killed_and_resumed_is_bit_equal(scenes: Path, pretrained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["scenes_small_pretrain", "--data", scenes, "--run", run, "--max_steps", "12", *SMALL]
    (process,) = forked.start("forked:train", [*map(str, arguments)], folder=tmp_path)
    deadline = time.monotonic() + 200
    while len(losses(run)) < 8:
        assert time.monotonic() < deadline
        assert process.is_alive(), "it ended before it could be killed"
        time.sleep(0.02)
    process.kill()
    process.join()
    assert (run / "checkpoints" / "step-00000006" / "complete.json").is_file()
    done = train("scenes_small_pretrain", "--data", scenes, "--run", run, "--max_steps", 12, "--resume")
    assert done.returncode == 0, done.stderr
    assert losses(run) == losses(pretrained)
    ours, theirs = (load_file(folder / "last" / "model.safetensors") for folder in (run, pretrained))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_an_incomplete_checkpoint_is_never_used_and_former_names_of_fields_are_read(
    scenes: Path, pretrained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(pretrained, run)
    saved = json.loads((run / "config.json").read_text())
    former = {old: saved["config"][new.split(".")[0]][new.split(".")[1]] for old, new in RENAMED.items()}
    saved["config"]["log"] |= {name.removeprefix("log."): value for name, value in former.items()}
    del saved["config"]["checkpoint"], saved["config"]["validation"]
    (run / "config.json").write_text(json.dumps(saved))
    (run / "checkpoints" / "step-00000012" / "complete.json").unlink()
    done = train("scenes_small_pretrain", "--data", scenes, "--run", run, "--max_steps", 12, "--resume")
    assert done.returncode == 0, done.stderr
    assert losses(run) == losses(pretrained)


@pytest.mark.slow
@pytest.mark.dist
def test_two_workers_under_torchrun(scenes: Path, tmp_path: Path) -> None:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "--")
    done = train_by_command(
        "scenes_small_pretrain", "--data", scenes, "--run", tmp_path / "run", "--max_steps", 2,
        "--engine.zero_stage", 2, launcher=launcher,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "run")) == 2
    assert (tmp_path / "run" / "best" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_stream_of_tars_trains_too(scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tars = scenes / "train" / "{00000..00000}.tar"
    done = train("scenes_small_pretrain", "--data", tars, "--val-data", scenes, "--run", run,
                 "--samples_per_epoch", 32, "--max_steps", 5)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(losses(run)) == 5


@pytest.fixture
def copied(pretrained: Path, tmp_path: Path) -> Path:
    """A copy of the stage-1 run, to damage."""
    run = tmp_path / "run"
    shutil.copytree(pretrained, run)
    return run


@pytest.mark.slow
def test_stopped_before_its_validation_a_resumed_run_validates(scenes: Path, copied: Path) -> None:
    marker = copied / "checkpoints" / "step-00000012" / "complete.json"
    state = json.loads(marker.read_text())
    marker.write_text(json.dumps({**state, "to_validate": True, "best": {}}))
    shutil.rmtree(copied / "last")
    done = train("scenes_small_pretrain", "--data", scenes, "--run", copied, "--max_steps", 12, "--resume")
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in read_rows(copied) if row["kind"] == "val"][-1] == 12
    assert json.loads(marker.read_text())["best"]["step"] == 12
    assert (copied / "last" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    scenes: Path, pretrained: Path, copied: Path, tmp_path: Path
) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {tmp_path}/ran",)

    file = next(copied.glob("checkpoints/step-00000012/worker-00000.safetensors"))
    torch.save({"module": Evil()}, file)
    done = train("scenes_small_pretrain", "--data", scenes, "--run", copied, "--max_steps", 12, "--resume")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists()
    assert re.search("step-00000012 is damaged .*: going on from step-00000006", done.stderr)
    assert losses(copied) == losses(pretrained)


@pytest.mark.slow
def test_a_disk_that_is_full_ends_the_run_in_one_line(scenes: Path, copied: Path) -> None:
    shutil.rmtree(copied / "checkpoints" / "step-00000012")
    arguments = ("scenes_small_pretrain", "--data", scenes, "--run", copied, "--max_steps", 12, "--resume")
    # No file may grow beyond 6 MB; the checkpoint takes 10.
    full = forked.run("forked:train", [*map(str, arguments), *SMALL], 6_000_000)
    assert full.returncode == 1, full.stderr
    assert re.search("could not be written .*File too large", full.stderr.strip().splitlines()[-1])
    done = train(*arguments)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_what_failed_while_building_leaves_the_folder_free(
    scenes: Path, pretrained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    wrong = train(
        "scenes_small_align", "--init", pretrained, "--run", run, "--model.gpo_width", 8, "--max_steps", 2
    )
    assert wrong.returncode == 2
    assert "has shape" in wrong.stderr
    right = train("scenes_small_align", "--init", pretrained, "--run", run, "--max_steps", 2)
    assert right.returncode == 0, right.stderr


@pytest.mark.dist
def test_damage_is_counted_over_all_workers(scenes: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    manifest = read_manifest(data, split="train").slice(0, 10).to_pylist()
    for row in manifest:
        with open(data / row["shard"], "r+b") as file:
            file.seek(row["image_offset"] + row["image_size"] // 2)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
    counts = []
    for workers, name in ((1, "one"), (2, "two")):
        done = train("scenes_small_pretrain", "--data", data, "--run", tmp_path / name, "--max_steps", 6,
                     workers=workers)  # fmt: skip
        assert done.returncode == 0, done.stderr
        counts.append([row for row in read_rows(tmp_path / name) if row["kind"] == "train"][-1]["damaged"])
        # A sample that replaces another may itself be damaged and met by both workers, each of which speaks of it.
        assert 10 <= (done.stdout + done.stderr).count("damaged sample replaced") <= 10 * len(counts)
    assert len(losses(tmp_path / "two")) == 6
    assert counts == [10, 10]


def test_a_run_in_use_is_not_trained_into(tmp_path: Path) -> None:
    held = run_folder.claim(tmp_path / "run")
    with pytest.raises(ValueError, match="is in use by another process"):
        run_folder.claim(tmp_path / "run")
    os.close(held)
    os.close(run_folder.claim(tmp_path / "run"))


def test_a_run_killed_before_its_first_checkpoint_starts_its_metrics_anew(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 1}\n{"kind": "tra')
    with RunLog(tmp_path, is_main=True, resume_step=0, total_steps=2) as log:
        log.row("train", 1, {"loss": 2.0})
    assert losses(tmp_path) == [2.0]


def test_folders_that_are_no_checkpoints_are_passed_over(tmp_path: Path) -> None:
    for name in ("step-00000002", "step-00000010", "step-foo", ".step-00000011"):
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "complete.json").write_text("{}")
    assert newest(tmp_path).name == "step-00000010"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("scenes_smal_pretrain --data {data} --run {new}", "did you mean 'scenes_small_pretrain'"),
        ("scenes_small_pretrain --data {data} --run {new} --optim.rl 1", "no field 'optim.rl'"),
        ("scenes_small_pretrain --data {empty} --run {new}", "manifest.parquet"),
        ("scenes_small_pretrain --data {data} --run {full} --batch_size 8", "is not empty"),
        ("scenes_small_pretrain --data {data} --run {full} --resume --batch_size 8", "holds no run"),
        ("scenes_small_pretrain --data {data} --run {file} --batch_size 8", "is a file"),
        (
            "scenes_small_pretrain --data {data} --run {new} --engine.deepspeed_json no.json --batch_size 8",
            "deepspeed_json no.json",
        ),
        ("scenes_small_pretrain --data {data}", "--run is missing"),
        ("scenes_small_pretrain --data x{{0..1}}.tar --run {new}", "give --val-data"),
        (
            "scenes_small_pretrain --data x{{0..1}}.tar --val-data {data} --run {new}",
            "give --samples_per_epoch",
        ),
        (
            "scenes_small_pretrain --data {data} --val-data {data} --run {new}",
            "--val-data goes with a stream",
        ),
        ("scenes_small_pretrain --run {new}", "--data is missing"),
        ("scenes_small_pretrain --data {data} --run {new} --batch_size 64", "batch_size is 64.* 48 "),
        ("scenes_small_finetune --data {data} --run {new}", "there is no teacher: give --init"),
        ("scenes_small_finetune --data {data} --run {new} --init {empty}", "neither a run"),
        ("", "no recipe given"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: str, message: str, scenes: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    places = {name: tmp_path / name for name in ("new", "full", "empty", "file")}
    places["file"].write_text("")
    places["empty"].mkdir()
    places["full"].mkdir()
    (places["full"] / "notes.txt").write_text("mine")
    assert main(arguments.format(data=scenes, **places).split()) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1

    assert re.search(message, lines[0]), lines[0]
    assert not places["new"].exists()


@pytest.mark.slow
def test_resuming_with_another_configuration_is_refused(
    scenes: Path, pretrained: Path, capfd: pytest.CaptureFixture
) -> None:
    arguments = f"scenes_small_pretrain --data {scenes} --run {pretrained} --max_steps 12 --resume".split()
    assert main([*arguments, *SMALL, "--optim.lr", "0.5"]) == 2
    assert "optim.lr was 0.001" in capfd.readouterr().err


@pytest.mark.slow
def test_resuming_on_other_data_is_refused(
    scenes: Path, pretrained: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    other = tmp_path / "other"
    shutil.copytree(scenes, other)
    arguments = f"scenes_small_pretrain --data {other} --run {pretrained} --max_steps 12 --resume".split()
    assert main([*arguments, *SMALL]) == 2
    assert "--resume: data was" in capfd.readouterr().err


def test_dry_run_prints_steps_and_memory_and_writes_nothing(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    assert main(["scenes_small_pretrain", "--data", str(scenes), "--run", str(run), "--dry-run", *SMALL]) == 0
    text = capsys.readouterr().out
    assert "6 an epoch" in text
    assert "activations" in text
    assert '"warmup_steps": 0' in text
    assert not run.exists()
