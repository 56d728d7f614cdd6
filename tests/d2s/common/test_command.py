"""Options of all commands: one function reads paths."""

import re
from pathlib import Path

import pytest

from d2s.common.command import user_path

ROOT = Path(__file__).resolve().parents[3]


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert user_path("~/runs/x") == Path("/home/somebody/runs/x")
    assert user_path("runs/~x") == Path("runs/~x")


def test_every_option_with_a_path_knows_the_tilde() -> None:
    files = [
        path for room in ("d2s", "shards", "kernels", "launchers") for path in (ROOT / room).rglob("*.py")
    ]
    assert [str(path) for path in files if re.search(r"type=(pathlib\.)?Path\b", path.read_text())] == []
