"""Writes files atomically, reads and writes JSON, and computes checksums."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_TEXT = (".txt", ".json", ".jsonl", ".parquet", ".csv", ".tsv", ".gz", ".bz2", ".xz", ".zst")


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file for writing. Flushes and renames it to `path` if the `with` block succeeds."""
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_path(path.parent)


def sync_path(path: Path | str) -> None:
    """Flushes a file or a folder to disk. Renames in a flushed folder survive a power cut.

    Does nothing on systems other than POSIX.
    """
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def parse_json(text: str | bytes) -> object:
    """Parses JSON. Raises ValueError, as `json.loads` does, and also if values are nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file atomically. Sorts keys, so that equal values give equal bytes."""
    with atomic_file(path) as file:
        file.write(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n")


def read_json(path: Path, read: Callable[[Path], str] | None = None) -> object:
    """Reads a JSON file. Raises ValueError, with the path, if the file is missing or is not JSON.

    read: function that returns the text of a file. If None, the file is read as UTF-8.
    """
    try:
        return parse_json(read(path) if read else path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: is a folder, not a file") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: line {error.lineno}: not JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start}: not UTF-8 text") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None


def input_sha256(paths: list[Path]) -> str:
    """Computes one sha256 over the names and contents of files.

    A folder counts with its text, JSON, table and compressed files, and `metadata.*` in its subfolders.
    """
    digest = hashlib.sha256()
    for path in paths:
        parts = (*path.iterdir(), *path.glob("*/metadata.*")) if path.is_dir() else ()
        files = sorted(part for part in parts if part.suffix in _TEXT) if path.is_dir() else [path]
        for file in files:
            digest.update(f"{file.name} {file_sha256(file)}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Returns the sha256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file atomically. If that fails, raises OSError with the file's name."""
    try:
        with atomic_file(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
