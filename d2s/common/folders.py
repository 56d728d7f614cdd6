"""Atomic folders: filled under a hidden name, flushed to the disk, then renamed.

A process that is killed meanwhile leaves the old folder or the new one, and hidden folders that the next writer
removes.
"""

import ctypes
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from d2s.common.files import sync_folder

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
# Errors of kernels, file systems (NFS) and C libraries that cannot exchange two names.
_UNKNOWN = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def fsync_tree(folder: Path) -> None:
    """Flushes every file below `folder`, and the folders themselves, to disk."""
    for root, _, files in os.walk(folder):
        for name in [*files, "."]:
            handle = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Fills a new folder with `write` and replaces `folder` by it."""
    fresh = folder.with_name(f".{folder.name}.new")
    recover(folder.parent)
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    write(fresh)
    fsync_tree(fresh)
    put_in_place(fresh, folder)


def put_in_place(fresh: Path, folder: Path) -> None:
    """Renames `fresh` to `folder`, replacing what is there; the change survives a power cut.

    Where two names cannot be exchanged in one step, the old folder has another name for a moment, from which
    :func:`recover` restores it.
    """
    if not folder.exists():
        fresh.rename(folder)
    elif exchange(fresh, folder):
        sync_folder(folder.parent)
        shutil.rmtree(fresh, ignore_errors=True)
    else:
        aside = _aside(folder)
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        fresh.rename(folder)
        sync_folder(folder.parent)
        shutil.rmtree(aside, ignore_errors=True)
    sync_folder(folder.parent)


def exchange(one: Path, other: Path) -> bool:
    """Exchanges two names in one step. Returns False where that is not possible; raises OSError on other errors."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    names = os.fsencode(one), os.fsencode(other)
    if call(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNKNOWN:
        return False
    raise OSError(number, os.strerror(number), str(other))


def discard(folder: Path) -> None:
    """Removes a folder. It is renamed first, so a killed process leaves only a hidden folder."""
    hidden = folder if folder.name.startswith(".") else folder.with_name(f".{folder.name}.gone")
    if hidden != folder:
        shutil.rmtree(hidden, ignore_errors=True)
        folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def recover(parent: Path) -> None:
    """Restores folders that a process renamed in `put_in_place` before it was killed."""
    for aside in sorted(parent.glob(".*.old")):
        folder = aside.with_name(aside.name[1 : -len(".old")])
        if aside.is_dir() and not folder.exists():
            aside.rename(folder)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")
