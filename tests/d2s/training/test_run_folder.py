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


def test_a_data_set_may_have_moved(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", data="data", val_data="data", fingerprint="a", init=None)
    moved = {"data": "/elsewhere/data", "val_data": "/elsewhere/data", "init": None}
    run_folder.check_run(run, TrainConfig(), {**moved, "fingerprint": "a"}, resume=True)
    with pytest.raises(ValueError, match="fingerprint was 'a'"):
        run_folder.check_run(run, TrainConfig(), {**moved, "fingerprint": "b"}, resume=True)


def test_another_stream_is_another_origin(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", data="a/{0..9}.tar", val_data="val", fingerprint="a", init=None)
    now = {"data": "b/{0..9}.tar", "val_data": "val", "fingerprint": "a", "init": None}
    with pytest.raises(ValueError, match="data was 'a/"):
        run_folder.check_run(run, TrainConfig(), now, resume=True)


def test_an_older_run_noted_its_initial_model_by_a_relative_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", data="data", val_data="data", fingerprint="a", init="first/best")
    monkeypatch.chdir(tmp_path)
    now = {"data": "data", "val_data": "data", "fingerprint": "a"}
    run_folder.check_run(run, TrainConfig(), {**now, "init": str(tmp_path / "first/best")}, resume=True)
    with pytest.raises(ValueError, match="init was 'first/best'"):
        run_folder.check_run(run, TrainConfig(), {**now, "init": "/other/best"}, resume=True)


def test_data_that_are_gone_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", data=str(tmp_path / "gone"), fingerprint="a", init=None)
    with pytest.raises(ValueError, match=r"was trained on .*gone, which is no folder here: name .* --data"):
        run_folder.data_of(run)
