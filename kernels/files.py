"""Files that are replaced whole or not at all: what was there survives a full disk and an interruption."""

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Replaces one file, in UTF-8. Raises OSError that names it, and has then left it as it was."""
    write_all({path: text})


def write_all(files: Mapping[Path, str]) -> None:
    """Replaces several files, of which none changes before all of them lie on the disk under other names.

    Raises OSError that names the file at fault; where it is raised before the first rename, nothing has changed.
    """
    written: dict[Path, Path] = {}
    try:
        for path, text in files.items():
            # A link stays one: what it points at is replaced.
            target = path.resolve()
            temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
            written[target] = temporary
            with _naming(path):
                _write(target, temporary, text.encode())
        for target, temporary in written.items():
            with _naming(target):
                os.replace(temporary, target)
    finally:
        for temporary in written.values():
            temporary.unlink(missing_ok=True)


def _write(target: Path, temporary: Path, content: bytes) -> None:
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    # A rename asks for no right to the file itself, so one that is write-protected would be replaced all the same.
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if target.exists():
        shutil.copymode(target, temporary)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Gives an OSError the name of the file that was asked for: a full disk names none, a rename the temporary."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
