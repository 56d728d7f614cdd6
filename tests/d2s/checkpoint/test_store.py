"""A checkpoint is complete or invisible: killed at every system call, damaged, or on a disk that is full."""

import sys
from pathlib import Path

import forked
import pytest
import torch
from safetensors.torch import load_file

from d2s.checkpoint.store import newest
from d2s.checkpoint.worker_file import WorkerFiles, slices_to_write, write_slices
from d2s.checkpoint.zero_state import TensorSlice
from d2s.common import folders


@pytest.mark.dist
@pytest.mark.skipif(sys.platform != "linux", reason="system calls are traced with Linux's ptrace")
def test_killed_at_every_system_call_it_leaves_the_old_or_the_new(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    done = forked.run("kill_points:main", tmp_path)
    if done.returncode == 77:
        pytest.skip("tracing a child process is not permitted here")
    assert done.returncode == 0, done.stderr
    with capsys.disabled():
        print(f"\n{done.stdout}", end="")
    assert done.stdout.count("points") == 6


@pytest.mark.dist
def test_damage_and_full_disks_are_one_line_and_the_last_good_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = forked.run("damage_points:main", tmp_path)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert "a limit on the size of files" in done.stdout
    assert "an unwritable folder" in done.stdout


def test_files_of_any_number_of_workers_hold_everything_once(tmp_path: Path) -> None:
    whole = {"weight/a": torch.randn(10), "buffer/b": torch.arange(3), "weight/c": torch.randn(1).bfloat16()}
    for world in (1, 3, 4):
        files = [tmp_path / f"{world}-{rank}" for rank in range(world)]
        for rank, path in enumerate(files):
            slices = [TensorSlice(name, 0, values, True) for name, values in whole.items()]
            write_slices(path, slices_to_write(slices, rank, world))
            load_file(path)  # the library reads what was written
        with WorkerFiles(files) as opened:
            assert opened.element_counts() == {name: len(values) for name, values in whole.items()}
            for name, values in whole.items():
                for start in range(len(values)):
                    part = TensorSlice(name, start, torch.zeros_like(values[start:]), False)
                    opened.read_into(part)
                    assert torch.equal(part.values, values[start:])


def test_a_file_that_lacks_elements_is_refused(tmp_path: Path) -> None:
    write_slices(tmp_path / "one", [TensorSlice("weight/a", 0, torch.randn(4), False)])
    with (
        WorkerFiles([tmp_path / "one"]) as opened,
        pytest.raises(ValueError, match="has 2 of 4 elements from 2 on"),
    ):
        opened.read_into(TensorSlice("weight/a", 2, torch.zeros(4), False))


def test_a_checkpoint_set_aside_counts_until_it_is_brought_back(tmp_path: Path) -> None:
    aside = tmp_path / "checkpoints" / ".step-00000003.old"
    aside.mkdir(parents=True)
    (aside / "complete.json").write_text("{}")
    assert newest(tmp_path) == aside
    folders.recover(aside.parent)
    assert newest(tmp_path).name == "step-00000003"
