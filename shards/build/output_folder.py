"""Checks and locks the folder that a build writes to."""

import errno
import fcntl
import shutil
from pathlib import Path
from typing import IO

from d2s.shards.format.file_names import CHECKSUMS, DESCRIPTION, SCRATCH


def check_output(out: Path, resume: bool) -> None:
    """Raises ValueError unless `out` is missing or empty or, with `resume`, holds an interrupted build."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file, not a folder")
    found = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if not found:
        return
    interrupted = SCRATCH in found
    if resume and not interrupted:
        raise ValueError(f"--out {out}: holds {found[0]}, but no interrupted build to resume")
    if not resume:
        remedy = "choose another folder"
        if interrupted:
            remedy = "--resume continues the build that was interrupted there"
        raise ValueError(f"--out {out}: not empty (holds {found[0]}); {remedy}")


def remove_description(folder: Path, force: bool) -> None:
    """Prepares a folder of tars for indexing. Raises ValueError if it is indexed, unless `force`."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if (folder / CHECKSUMS).exists() and not force:
        raise ValueError(f"{folder}: is indexed already; --force does it anew")
    # The checksums are removed first, so that a half-removed description never looks complete.
    for name in (CHECKSUMS, *DESCRIPTION):
        (folder / name).unlink(missing_ok=True)
    if force:
        shutil.rmtree(folder / SCRATCH, ignore_errors=True)


def lock(file: IO[str], out: Path, shared: bool = False) -> None:
    """Locks a file until it is closed. Raises ValueError if another process holds the lock."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"--out {out}: another build is writing there now") from None
    except OSError as error:
        # Some cluster file systems have no locks. On these, the user must not start two builds at once.
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise


def remove_empty_build(out: Path, own: Path) -> None:
    """Removes the scratch folder of a build refused before its first shard, unless other parts use it."""
    scratch = out / SCRATCH
    others = [path for path in scratch.glob("assignment-*") if path != own]
    if not (scratch / "settings.json").exists() and not others:
        shutil.rmtree(scratch)
        if not any(out.iterdir()):
            out.rmdir()
