"""The rules of the house that import-linter does not know: names, sizes, and what a file may reach for."""

import ast
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("d2s", "kernels", "shards", "launchers")
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
IDS = [str(path.relative_to(ROOT)) for path in FILES]


def test_files_are_short() -> None:
    lines = {name: len(path.read_text().splitlines()) for name, path in zip(IDS, FILES, strict=True)}
    assert [name for name, count in lines.items() if count > 400] == []
    assert statistics.median(lines.values()) <= 150


def test_no_name_starts_with_its_room_s_name() -> None:
    assert [
        name for name, path in zip(IDS, FILES, strict=True) if path.stem.startswith(path.parent.name)
    ] == []


def test_nobody_reaches_into_another_file() -> None:
    """No underscore name of another file of ours is imported or read, and no attribute of its is replaced."""
    assert [fault for name, path in zip(IDS, FILES, strict=True) for fault in _faults(name, path)] == []


def _faults(name: str, path: Path) -> list[str]:
    tree = ast.parse(path.read_text())
    ours, found = set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "d2s":
            ours |= {alias.asname or alias.name for alias in node.names}
            private = [alias.name for alias in node.names if alias.name.startswith("_")]
            found += [f"{name}:{node.lineno} imports {imported}" for imported in private]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ours:
            if node.attr.startswith("_") and not node.attr.startswith("__"):
                found.append(f"{name}:{node.lineno} reads {node.value.id}.{node.attr}")
            if isinstance(node.ctx, ast.Store):
                found.append(f"{name}:{node.lineno} replaces {node.value.id}.{node.attr}")
    return found
