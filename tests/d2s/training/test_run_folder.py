"""What a run folder remembers of its data, and when a run may be resumed."""

from pathlib import Path

import pytest

from d2s.training import run_folder
from d2s.training.config import TrainConfig


def make_run(folder: Path, **origin: str | None) -> Path:
    """A run folder that began with this origin."""
    folder.mkdir()
    run_folder.write(folder, TrainConfig(), origin, 1)
    return folder


def test_another_origin_is_refused(tmp_path: Path) -> None:
    origin = {"data": "/a/data", "val_data": "/a/data", "fingerprint": "1", "init": "/a/best"}
    run = make_run(tmp_path / "run", **origin)
    run_folder.check_run(run, TrainConfig(), origin, resume=True)
    for name, value in {"data": "/b/data", "fingerprint": "2", "init": "/a/last"}.items():
        with pytest.raises(ValueError, match=f"--resume: {name} was '{origin[name]}' in .* now '{value}'"):
            run_folder.check_run(run, TrainConfig(), origin | {name: value}, resume=True)


def test_older_runs_saved_relative_paths(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", data="sets/f8k", val_data="sets/f8k", fingerprint="1", init="first/best")
    now = {"data": "/x/sets/f8k", "val_data": "/x/sets/f8k", "fingerprint": "1", "init": "/x/first/best"}
    run_folder.check_run(run, TrainConfig(), now, resume=True)
    with pytest.raises(ValueError, match="data was 'sets/f8k'"):
        run_folder.check_run(run, TrainConfig(), now | {"data": "/x/other/f8k"}, resume=True)


def test_data_that_are_gone_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", data=str(tmp_path / "gone"), fingerprint="a", init=None)
    with pytest.raises(ValueError, match=r"was trained on .*gone, which is no folder here: name .* --data"):
        run_folder.data_of(run)
