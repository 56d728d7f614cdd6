"""A build in parts, each a process of its own as in a job array, makes what one build makes."""

import subprocess
import sys
from pathlib import Path

import pytest

from d2s.shards.cli import main

SCENES = ["--source", "scenes", "--count", "train=70,val=10,test=10", "--size", "32", "--shard-size", "20"]


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _build(out: Path, *more: str) -> int:
    return main(["build", *SCENES, "--out", str(out), *more])


def test_parts_at_once_equal_one_build(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert _build(whole) == 0
    command = [sys.executable, "-m", "d2s.shard", "build", *SCENES, "--out", str(parts)]
    started = [
        subprocess.Popen([*command, "--part", f"{i}/3"], stdout=subprocess.PIPE, text=True) for i in (1, 2, 3)
    ]
    said = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert sum("samples" in text for text in said) == 1, said
    assert _bytes(parts) == _bytes(whole)


def test_one_after_the_other_the_last_joins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert _build(out, "--part", "2/2") == 0
    assert "the last part to end joins them" in capsys.readouterr().out
    assert not (out / "checksums.json").exists()
    assert _build(out, "--part", "1/2") == 0
    assert (out / "checksums.json").exists()
    assert not (out / ".build").exists()
    assert _build(out, "--part", "1/2") == 0
    assert "complete already" in capsys.readouterr().out


def test_a_part_of_other_settings_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert _build(out, "--part", "1/2") == 0
    assert _build(out, "--part", "2/2", "--seed", "7") == 2
    assert "changed since the interrupted build" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0/2", "3/2", "x", "1/"])
def test_a_part_that_is_none_is_named(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _build(tmp_path / "out", "--part", text)
    assert "is not I/N" in capsys.readouterr().err
