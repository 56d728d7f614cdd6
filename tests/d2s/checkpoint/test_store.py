"""A checkpoint is complete or invisible: killed at every system call, damaged, or on a disk that is full."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from d2s.checkpoint.store import newest
from d2s.checkpoint.worker_file import Shares, own_share, write_share
from d2s.checkpoint.zero_state import Piece
from d2s.common import folders

HERE = Path(__file__).parents[1]


def run_script(name: str, folder: Path) -> subprocess.CompletedProcess:
    env = {**os.environ, "D2S_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, HERE / name, folder]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=280, env=env, cwd=folder, check=False
    )


@pytest.mark.dist
@pytest.mark.skipif(sys.platform != "linux", reason="system calls are traced with Linux's ptrace")
def test_killed_at_every_system_call_it_leaves_the_old_or_the_new(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    done = run_script("kill_points.py", tmp_path)
    if done.returncode == 77:
        pytest.skip("tracing a child process is not permitted here")
    assert done.returncode == 0, done.stderr
    with capsys.disabled():
        print(f"\n{done.stdout}", end="")
    assert done.stdout.count("points") == 6


@pytest.mark.dist
def test_damage_and_full_disks_are_one_line_and_the_last_good_one_stays(tmp_path: Path) -> None:
    done = run_script("damage_points.py", tmp_path)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert "a limit on the size of files" in done.stdout
    assert "an unwritable folder" in done.stdout


def test_shares_of_any_number_of_workers_hold_everything_once(tmp_path: Path) -> None:
    whole = {"weight/a": torch.randn(10), "buffer/b": torch.arange(3), "weight/c": torch.randn(1).bfloat16()}
    for world in (1, 3, 4):
        files = [tmp_path / f"{world}-{rank}" for rank in range(world)]
        for rank, path in enumerate(files):
            pieces = [Piece(name, 0, values, True) for name, values in whole.items()]
            write_share(path, own_share(pieces, rank, world))
            load_file(path)  # the library reads what was written
        with Shares(files) as shares:
            assert shares.sizes() == {name: len(values) for name, values in whole.items()}
            for name, values in whole.items():
                for start in range(len(values)):
                    part = Piece(name, start, torch.zeros_like(values[start:]), False)
                    shares.fill(part)
                    assert torch.equal(part.values, values[start:])


def test_a_share_that_lacks_elements_is_refused(tmp_path: Path) -> None:
    write_share(tmp_path / "one", [Piece("weight/a", 0, torch.randn(4), False)])
    with (
        Shares([tmp_path / "one"]) as shares,
        pytest.raises(ValueError, match="has 2 of 4 elements from 2 on"),
    ):
        shares.fill(Piece("weight/a", 2, torch.zeros(4), False))


def test_a_checkpoint_set_aside_counts_until_it_is_brought_back(tmp_path: Path) -> None:
    aside = tmp_path / "checkpoints" / ".step-00000003.old"
    aside.mkdir(parents=True)
    (aside / "complete.json").write_text("{}")
    assert newest(tmp_path) == aside
    folders.recover(aside.parent)
    assert newest(tmp_path).name == "step-00000003"
