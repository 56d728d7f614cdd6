"""Options of all commands: one function reads paths."""

import ast
import re
from pathlib import Path

import pytest

from d2s.common.command import user_path

ROOT = Path(__file__).resolve().parents[3]


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/runs/x") == tmp_path / "runs/x"
    assert user_path("runs/~x") == Path("runs/~x")


def options_with_a_path() -> list[tuple[str, ast.Call]]:
    """Every call that adds an option or argument whose metavar names a folder or file, with its place."""
    found = []
    for room in ("d2s", "shards", "kernels", "launchers"):
        for path in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                given = {word.arg: word.value for word in getattr(node, "keywords", ())}
                metavar = given.get("metavar")
                if isinstance(metavar, ast.Constant) and re.match(r"DIR|FILE|RUN|CKPT", str(metavar.value)):
                    found.append((f"{path.relative_to(ROOT)}:{node.lineno}", node))
    return found


def test_every_option_with_a_path_knows_the_tilde() -> None:
    options = options_with_a_path()
    assert len(options) > 20
    types = {
        place: next((w.value for w in call.keywords if w.arg == "type"), None) for place, call in options
    }
    names = {place: ast.unparse(value) if value else "none" for place, value in types.items()}
    expanding = {"user_path", "home", "_caption_file", "_path_pairs"}
    assert {place: name for place, name in names.items() if name not in expanding} == {}
