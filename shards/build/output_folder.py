"""Checks and locks the output folder of a build."""

import errno
import fcntl
import shutil
from pathlib import Path
from typing import IO

from d2s.shards.format.file_names import CHECKSUMS, DESCRIPTION, QUARANTINE, SCRATCH


def check_output(out: Path, resume: bool) -> None:
    """Checks that `out` can be used: missing, empty, or with an interrupted build if `resume`. Raises ValueError."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file, not a folder")
    found = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    # A build that left out every image ends with an error. It leaves only quarantine.jsonl, which lists the reasons.
    if not found or found == [QUARANTINE]:
        return
    interrupted = SCRATCH in found
    if resume and not interrupted:
        raise ValueError(f"--out {out}: holds {found[0]}, but no interrupted build to resume")
    if not resume:
        remedy = "choose another folder"
        if interrupted:
            remedy = "--resume continues the build that was interrupted there"
        raise ValueError(f"--out {out}: not empty (holds {found[0]}); {remedy}")


def link_tars(folder: Path, out: Path, tars: list[Path]) -> None:
    """Fills `out` with links to `tars`, which are in `folder`. Raises ValueError if `out` has other tars."""
    if out.resolve().is_relative_to(folder.resolve()) or folder.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"--out {out}: lies in {folder} or around it; choose another folder")
    links = {out / path.relative_to(folder): path.resolve() for path in tars}
    there = {*out.glob("*.tar"), *out.glob("*/*.tar")} if out.is_dir() else set()
    for path in sorted(there):
        if path not in links or path.resolve() != links[path]:
            raise ValueError(f"--out {out}: holds {path.name}, which is no link to a tar of {folder}")
    for link in links.keys() - there:
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(links[link])


def remove_description(folder: Path, force: bool) -> None:
    """Removes the files that describe the tars in `folder`. Raises ValueError if CHECKSUMS exists, unless `force`."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if (folder / CHECKSUMS).exists() and not force:
        raise ValueError(f"{folder}: is indexed already; --force does it anew")
    # checksums.json is removed first, because a data set that has this file counts as complete.
    for name in (CHECKSUMS, *DESCRIPTION):
        (folder / name).unlink(missing_ok=True)
    if force:
        shutil.rmtree(folder / SCRATCH, ignore_errors=True)


def lock(file: IO[str], out: Path, shared: bool = False) -> None:
    """Locks `file` until it is closed. Raises ValueError, which names `out`, if another process holds the lock."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"--out {out}: another build is writing there now") from None
    except OSError as error:
        # Some cluster file systems have no locks. On these, the user must not start two builds at once.
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise


def remove_empty_build(out: Path, own: Path) -> None:
    """Removes the scratch folder, and an empty `out`, if a build fails before its first shard.

    Keeps the scratch folder if another part of the build has a folder there. own: the folder of this part.
    """
    scratch = out / SCRATCH
    others = [path for path in scratch.glob("assignment-*") if path != own]
    if not (scratch / "settings.json").exists() and not others:
        shutil.rmtree(scratch)
        if not any(out.iterdir()):
            out.rmdir()
