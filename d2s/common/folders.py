"""Replaces folders atomically: a folder is filled under a hidden name, flushed to disk, then renamed.

If the process is killed, the old or the new folder is complete. The next write removes hidden folders.
"""

import ctypes
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from d2s.common.files import sync_path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
# The kernel, the file system (NFS) or the C library reports these errors if it cannot exchange two names.
_UNKNOWN = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def fsync_tree(folder: Path) -> None:
    """Flushes `folder`, its subfolders and all their files to disk."""
    for root, _, files in os.walk(folder):
        for name in [*files, "."]:
            sync_path(os.path.join(root, name))


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Creates a new folder, calls `write` with its path to fill it, and renames it to `folder`."""
    fresh = folder.with_name(f".{folder.name}.new")
    recover(folder.parent)
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    write(fresh)
    fsync_tree(fresh)
    put_in_place(fresh, folder)


def put_in_place(fresh: Path, folder: Path) -> None:
    """Renames the folder `fresh` to `folder` and flushes the change to disk. Removes an old `folder`.

    If the system cannot exchange two names in one operation, the old folder gets a temporary name first. If
    the process is killed before `fresh` is renamed, :func:`recover` restores the old folder.
    """
    if not folder.exists():
        fresh.rename(folder)
    elif exchange(fresh, folder):
        sync_path(folder.parent)
        shutil.rmtree(fresh, ignore_errors=True)
    else:
        aside = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        fresh.rename(folder)
        sync_path(folder.parent)
        shutil.rmtree(aside, ignore_errors=True)
    sync_path(folder.parent)


def exchange(one: Path, other: Path) -> bool:
    """Swaps the names of two folders in one operation.

    Returns True on success and False if the system does not support this. Raises OSError on other errors.
    """
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
    """Removes a folder. The folder gets a hidden name first, so that no visible folder is incomplete."""
    if not folder.name.startswith("."):
        hidden = folder.with_name(f".{folder.name}.gone")
        shutil.rmtree(hidden, ignore_errors=True)
        folder = folder.rename(hidden)
    shutil.rmtree(folder, ignore_errors=True)


def recover(parent: Path) -> None:
    """Renames old folders in `parent` back, if a process was killed in `put_in_place`."""
    for aside in sorted(parent.glob(".*.old")):
        folder = aside.with_name(aside.name[1 : -len(".old")])
        if aside.is_dir() and not folder.exists():
            aside.rename(folder)
