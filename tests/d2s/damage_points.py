"""Damages checkpoints and fills disks, and checks what a restart reports; test_store.py starts `main`."""

import contextlib
import io
import json
import pickle
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_saves import STATE, Saves

from d2s.checkpoint import store as checkpoint
from d2s.workers.group import leave

WEIGHTS, MARKER = "worker-00000.safetensors", "complete.json"


class Evil:
    """What a bare unpickle would run."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path("ran"),)


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def unpickled(path: Path) -> None:
    """A pickle in the place of the numbers, its checksum being right."""
    path.write_bytes(pickle.dumps(Evil()))
    marker = json.loads((path.parent / MARKER).read_text())
    marker["files"][path.name] = checkpoint.file_sha256(path)
    (path.parent / MARKER).write_text(json.dumps(marker))


def outside(path: Path) -> None:
    marker = json.loads(path.read_text())
    marker["files"] = {"../../../elsewhere": ""}
    path.write_text(json.dumps(marker))


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a flipped bit in the first byte": (WEIGHTS, lambda path: flip(path, 0), "differs from its checksum"),
    "a flipped bit in the last byte": (WEIGHTS, lambda path: flip(path, -1), "differs from its checksum"),
    "half a file": (
        WEIGHTS,
        lambda path: path.write_bytes(path.read_bytes()[:500]),
        "differs from its checksum",
    ),
    "a vanished file": (WEIGHTS, Path.unlink, WEIGHTS),
    "a pickle": (WEIGHTS, unpickled, WEIGHTS),
    "half a marker": (MARKER, lambda path: path.write_text(path.read_text()[:40]), "Expecting"),
    "a marker that lacks state": (MARKER, lambda path: path.write_text('{"step": 2}'), "lacks some of"),
    "a marker that leads outside": (MARKER, outside, "elsewhere"),
}


def try_damage(saves: Saves) -> None:
    for what, (name, damage, words) in DAMAGE.items():
        saves.put_back()
        damage(saves.run / "checkpoints" / "step-00000002" / name)
        printed = io.StringIO()
        with contextlib.redirect_stderr(printed):
            assert saves.restored() == 1, what
        lines = printed.getvalue().splitlines()
        assert len(lines) == 1, lines
        assert "step-00000002 is damaged" in lines[0], lines
        assert words in lines[0], lines
        assert "going on from step-00000001" in lines[0], lines
        saves.save(1)
        assert checkpoint.newest(saves.run).name == "step-00000001", "the damaged one would be met again"
        assert not Path("ran").exists()
        print(f"{what}: {lines[0].split('damaged ')[1]}")
    saves.put_back()
    for step in (1, 2):
        flip(saves.run / "checkpoints" / f"step-{step:08d}" / WEIGHTS, 200)
    message = refused(saves.restored)
    assert "there is no older one: remove" in message, message
    print(f"all damaged: {message}")


def refused(action: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as caught:
        action()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def try_full(saves: Saves, words: str) -> str:
    """A save that cannot be finished: one line, which is returned, and the older checkpoints stay as they are."""
    message = refused(lambda: saves.save(3))
    assert words in message, message
    assert "--resume goes on from step-00000002" in message, message
    assert saves.restored() == 2
    refused(
        lambda: checkpoint.update(
            saves.run, 2, {**STATE, "step": 2, "best": {"name": "x" * 5000}}, is_main=True
        )
    )
    assert saves.restored() == 2
    assert not [path for path in saves.run.rglob("*") if ".step" in path.name or ".tmp" in path.name]
    return message


def main(folder: Path) -> None:
    saves = Saves(folder, keep=2)
    try_damage(saves)
    saves.put_back()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, limit[1]))
    message = try_full(saves, "File too large")
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    print(f"a limit on the size of files: {message}")
    saves.run = folder / "small"
    saves.run.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "none", saves.run], check=False).returncode:
        print("a full disk: not tried, mounting one is not permitted")
    else:
        try:
            shutil.copytree(saves.copy, saves.run, dirs_exist_ok=True)
            with contextlib.suppress(OSError), open(saves.run / "filler", "wb") as filler:
                while filler.write(bytes(4096)):
                    filler.flush()
            print(f"a full disk: {try_full(saves, 'No space left on device')}")
        finally:
            subprocess.run(["umount", saves.run], check=True)
    saves.run = folder / "blocked"
    saves.run.mkdir()
    (saves.run / "checkpoints").write_text("a file in the way")
    print(f"an unwritable folder: {refused(lambda: saves.save(3))}", flush=True)
    leave(0, ordered=True)
