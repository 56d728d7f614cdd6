"""A disk that is full, wherever a run writes: one line that names the file, and nothing left that fills it."""

import errno
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import d2s.training.build
import d2s.training.checks
from d2s.checkpoint.export import write_model
from d2s.model import build_word_tokenizer
from d2s.train import main
from d2s.training.run_log import RunLog
from d2s.training.teacher_table import allocate_file, teacher_table
from d2s.workers.group import Workers


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: a full disk for whoever asks for more."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_row_of_metrics(tmp_path: Path) -> None:
    line = r"metrics.jsonl could not be written \(No space left on device\): make room"
    log = RunLog(tmp_path, is_main=True, resume_step=0, total_steps=2)
    log._file.close()
    log._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    with pytest.raises(ValueError, match=line), log:
        log.row("train", 1, {"loss": 2.0})


def test_a_mirror_of_metrics(tmp_path: Path) -> None:
    log = RunLog(tmp_path, is_main=True, resume_step=0, total_steps=2)

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log._board.add_scalar = log._board.close = full
    line = r"tensorboard could not be written \(No space left on device\): make room"
    with pytest.raises(ValueError, match=line) as caught, log:
        log.row("train", 1, {"loss": 2.0})
    assert caught.value.__context__.__class__ is OSError, "that of closing would hide it"
    with pytest.raises(ValueError, match=line):
        log.__exit__(None, None, None)


def test_any_other_file_while_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    class Trainer:
        def __enter__(self) -> "Trainer":
            return self

        def __exit__(self, *failure: object) -> None:
            pass

        def train(self) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "some.file"))

    monkeypatch.setattr(d2s.training.checks, "check_arguments", lambda options, overrides: None)
    monkeypatch.setattr(d2s.training.build, "build_trainer", lambda spec, preemption: Trainer())
    assert main(["scenes_small_pretrain"]) == 1
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "No space left on device" in lines[0]
    assert "some.file" in lines[0]
    assert "make room" in lines[0]


def test_the_teachers_table_has_its_room_before_it_is_mapped(tmp_path: Path) -> None:
    allocate_file(tmp_path / "table", 100_000)
    assert (tmp_path / "table").stat().st_size == 100_000
    assert (tmp_path / "table").stat().st_blocks * 512 >= 100_000
    teacher = SimpleNamespace(text_encoder=SimpleNamespace(linear=SimpleNamespace(out_features=16)))
    index = SimpleNamespace(
        column=lambda name: [0], rows=lambda split: range(9), total=lambda split, kind: 1000
    )
    workers = Workers(rank=0, world=1, device=torch.device("cpu"))
    with (
        small_files(1000),
        pytest.raises(ValueError, match=r"table .*dense.f32 could not be written .*make room"),
    ):
        teacher_table(tmp_path / "teacher", teacher, index, "train", None, workers, made_from="")
    assert not list((tmp_path / "teacher").iterdir())


@pytest.mark.parametrize("file", ["tokenizer_config.json", "tokenizer.json"])  # by Python, and by the library
def test_a_model_leaves_nothing_behind(file: str, tmp_path: Path) -> None:
    tokenizer = build_word_tokenizer([" ".join(f"word{n}" for n in range(999))], min_count=1)
    model = SimpleNamespace(save_pretrained=tokenizer.save_pretrained)
    write_model(tmp_path / "best", model)
    size = (tmp_path / "best" / file).stat().st_size
    shutil.rmtree(tmp_path / "best")
    with small_files(size - 1), pytest.raises(OSError, match="File too large") as caught:
        write_model(tmp_path / "best", model)
    assert caught.value.filename == str(tmp_path / "best")
    assert not list(tmp_path.iterdir())
    write_model(tmp_path / "best", model)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_a_bug_while_a_model_is_written_is_no_full_disk(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        write_model(tmp_path / "best", SimpleNamespace(save_pretrained=lambda folder: {}["no"]))
