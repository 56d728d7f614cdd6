"""Kills a process at every system call of a save and checks what a restart finds; test_store.py starts `main`.

Every point is a child of this process, which has everything imported: it traces the child's system calls with
ptrace and ends it with SIGKILL just before the n-th, for every n that there is. Linux only; exits with 77 where
tracing is not permitted.
"""

import ctypes
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from checkpoint_saves import Saves

from d2s.common import folders
from d2s.workers.group import leave

TRACEME, SYSCALL, SETOPTIONS = 0, 24, 0x4200
SYSGOOD, EXITKILL = 1, 1 << 20
AT_SYSCALL = signal.SIGTRAP | 0x80
NOT_PERMITTED = 77

libc = ctypes.CDLL(None, use_errno=True)


def trace(request: int, process: int, data: int = 0) -> None:
    if libc.ptrace(request, process, None, ctypes.c_void_p(data)) < 0:
        raise OSError(ctypes.get_errno(), "ptrace")


def killed_at(number: int, action: Callable[[], None]) -> bool:
    """Runs `action` in a child, which is killed before its `number`-th system call. False if it has fewer."""
    child = os.fork()
    if child == 0:
        try:
            trace(TRACEME, 0)
        except OSError:
            os._exit(NOT_PERMITTED)
        os.kill(os.getpid(), signal.SIGSTOP)
        action()
        os.kill(os.getpid(), signal.SIGSTOP)  # what follows belongs to leaving, not to the save
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        sys.exit(NOT_PERMITTED)
    trace(SETOPTIONS, child, SYSGOOD | EXITKILL)
    entering, calls, passed = True, 0, 0
    while True:
        trace(SYSCALL, child, passed)
        _, status = os.waitpid(child, 0)
        assert os.WIFSTOPPED(status), f"the save failed by itself: {status}"
        stopped = os.WSTOPSIG(status)
        passed = 0
        if stopped == AT_SYSCALL:
            calls += entering
            entering = not entering
        elif stopped != signal.SIGSTOP:
            passed = stopped
        if calls == number or stopped == signal.SIGSTOP:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return stopped != signal.SIGSTOP


def points(action: Callable[[], None], before: Callable[[], None], after: Callable[[], None]) -> int:
    """Kills `action` at each of its system calls, between `before` and `after`; returns how many there were."""
    number = 0
    while True:
        before()
        number += 1
        alive = not killed_at(number, action)
        after()
        if alive:
            return number - 1


def try_saves(saves: Saves, step: int) -> tuple[int, list[int]]:
    """Kills the save of `step`; returns the number of points, and the steps that restarts found."""
    found: list[int] = []

    def before() -> None:
        saves.put_back()
        saves.fill(step)

    def after() -> None:
        found.append(saves.restored())
        saves.fill(2)
        saves.save(2)  # what the dead one left is in nobody's way
        assert saves.restored() == 2
        assert [path.name for path in (saves.run / "checkpoints").iterdir()] == ["step-00000002"]

    return points(lambda: saves.save(step), before, after), found


def try_replacing(folder: Path) -> tuple[int, list[str]]:
    """Kills the replacement of a model folder; returns the number of points, and what restarts found there."""
    best, found = folder / "best", []

    def write(what: str) -> Callable[[Path], None]:
        def both(into: Path) -> None:
            for name in ("config.json", "model.safetensors"):
                (into / name).write_text(what)

        return both

    def before() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folders.replace_folder(best, write("old"))

    def after() -> None:
        folders.recover(folder)
        texts = {path.read_text() for path in best.iterdir()}
        assert len(texts) == 1, "a mixture"
        assert len(list(best.iterdir())) == 2, "a part"
        found.extend(texts)

    return points(lambda: folders.replace_folder(best, write("new")), before, after), found


def main(folder: Path) -> None:
    saves = Saves(folder, keep=1)
    for way in ("exchanged", "set aside"):
        if way == "set aside":  # as where the file system cannot exchange two names
            folders.exchange = lambda one, other: False
        count, found = try_saves(saves, 2)
        assert set(found) == {1, 2}, found
        print(
            f"save, {way}: {count} points, {found.count(1)} found the old one, {found.count(2)} the new one"
        )
        count, found = try_saves(saves, 1)
        assert set(found) == {1}, found
        print(f"save over the same step, {way}: {count} points, all found it")
        count, found = try_replacing(folder / "models")
        assert set(found) == {"old", "new"}, found
        print(
            f"best model, {way}: {count} points, {found.count('old')} old, {found.count('new')} new",
            flush=True,
        )
    leave(0, ordered=True)
