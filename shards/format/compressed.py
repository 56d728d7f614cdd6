"""Detects compressed files by their first bytes, and reads them as streams."""

import bz2
import gzip
import lzma
import os
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from d2s.common.messages import shorten

_CHUNK = 1 << 16


def _zstd(path: Path) -> BinaryIO:
    return pa.input_stream(str(path), compression="zstd")


_KINDS: dict[str, tuple[bytes, Callable[[Path], BinaryIO]]] = {
    "gzip": (b"\x1f\x8b", gzip.open),
    "bzip2": (b"BZh", bz2.open),
    "xz": (b"\xfd7zXZ\x00", lzma.open),
    "zstd": (b"\x28\xb5\x2f\xfd", _zstd),
}


def compression(path: Path) -> str:
    """Returns "gzip", "bzip2", "xz" or "zstd"; "" for an uncompressed file. Raises OSError."""
    with open(path, "rb") as file:
        head = file.read(6)
    return next((name for name, (magic, _) in _KINDS.items() if head.startswith(magic)), "")


def open_compressed(path: Path, kind: str) -> BinaryIO:
    """Opens a compressed file for reading decompressed bytes. kind: as `compression` returns it."""
    return _KINDS[kind][1](path)


def decompress(path: Path, kind: str, target: Path) -> str:
    """Decompresses `path` to `target`, unless `target` exists. Writes only the readable part of damaged data.

    Returns a description of the damage, or "".
    """
    if target.exists():
        return ""
    fault = ""
    target.parent.mkdir(parents=True, exist_ok=True)
    # The temporary name is unique, because another process may be writing the same target.
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as copy:
        try:
            with open_compressed(path, kind) as file:
                while data := _next(file):
                    if isinstance(data, Exception):
                        fault = f"its {kind} data is cut short or damaged: {shorten(str(data), 100)}"
                        break
                    copy.write(data)
            os.replace(copy.name, target)
        finally:
            Path(copy.name).unlink(missing_ok=True)
    return fault


def _next(file: BinaryIO) -> bytes | Exception:
    """Returns the next bytes. Returns a read error too, so that the caller can tell it from a write error."""
    try:
        return file.read(_CHUNK)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        return error
