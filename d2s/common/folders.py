"""Replaces folders atomically: a folder is filled under a hidden name, flushed to disk, then renamed.

If the process is killed meanwhile, the old or new folder is complete; the next write removes hidden ones.
"""

import ctypes
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from d2s.common.files import sync_path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
# Error numbers if the kernel, the file system (NFS) or the C library cannot exchange two names.
_UNKNOWN = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def fsync_tree(folder: Path) -> None:
    """Flushes `folder`, its subfolders and all their files to disk."""
    for root, _, files in os.walk(folder):
        for name in [*files, "."]:
            sync_path(os.path.join(root, name))


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Creates a new folder, lets `write` fill it, and replaces `folder` with it."""
    fresh = folder.with_name(f".{folder.name}.new")
    recover(folder.parent)
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    write(fresh)
    fsync_tree(fresh)
    put_in_place(fresh, folder)


def put_in_place(fresh: Path, folder: Path) -> None:
    """Renames `fresh` to `folder`, replaces an existing `folder`, and flushes the change to disk.

    If the system cannot exchange two names in one operation, the old folder has a temporary name for a
    moment. If the process is killed then, :func:`recover` restores the old folder.
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

    Returns False if the system does not support that. Raises OSError on other errors.
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
    """Gives a folder a hidden name, then removes it, so no half-removed folder is ever visible."""
    if not folder.name.startswith("."):
        hidden = folder.with_name(f".{folder.name}.gone")
        shutil.rmtree(hidden, ignore_errors=True)
        folder = folder.rename(hidden)
    shutil.rmtree(folder, ignore_errors=True)


def recover(parent: Path) -> None:
    """Restores old folders that `put_in_place` had set aside when the process was killed."""
    for aside in sorted(parent.glob(".*.old")):
        folder = aside.with_name(aside.name[1 : -len(".old")])
        if aside.is_dir() and not folder.exists():
            aside.rename(folder)
