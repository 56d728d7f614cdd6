"""Compressed files: known by their first bytes, read as a stream."""

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa


def _zstd(path: Path) -> BinaryIO:
    return pa.input_stream(str(path), compression="zstd")


_KINDS: dict[str, tuple[bytes, Callable[[Path], BinaryIO]]] = {
    "gzip": (b"\x1f\x8b", gzip.open),
    "bzip2": (b"BZh", bz2.open),
    "xz": (b"\xfd7zXZ\x00", lzma.open),
    "zstd": (b"\x28\xb5\x2f\xfd", _zstd),
}


def compression(path: Path) -> str:
    """How a file is compressed: "gzip", "bzip2", "xz", "zstd", or "" if it is not. Raises OSError."""
    with open(path, "rb") as file:
        head = file.read(6)
    return next((name for name, (magic, _) in _KINDS.items() if head.startswith(magic)), "")


def open_compressed(path: Path, kind: str) -> BinaryIO:
    """Opens a file of this compression; reading it gives the bytes that were compressed."""
    return _KINDS[kind][1](path)
