"""Reads text files of a source: UTF-8, with or without byte-order mark, plain or gzip, bzip2, xz or zstd."""

import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

from d2s.common.files import read_json
from d2s.common.messages import shorten
from d2s.shards.format.compressed import compression, open_compressed

_UTF16 = (b"\xff\xfe", b"\xfe\xff")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
"""Suffixes of compressed files."""


def plain_name(path: Path) -> str:
    """Returns the name of a file without .gz or the like: rows.jsonl for rows.jsonl.gz."""
    return path.stem if path.suffix.lower() in COMPRESSED else path.name


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """Opens a file, decompressed. Read errors, also in the `with` block, become ValueError with the path."""
    try:
        kind = compression(path)
        with open_compressed(path, kind) if kind else open(path, "rb") as file:
            yield file
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{path}: a compressed file that is damaged or cut short: {error}") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or shorten(str(error))}") from None


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Opens a text file, decompressed, without its byte-order mark. Lines end only at "\\n".

    `str.splitlines` would also split at form feeds and U+2028, which captions may contain. Lone carriage
    returns must not split either, because JSON allows them inside a value.
    """
    with (
        open_bytes(path) as file,
        io.TextIOWrapper(file, encoding="utf-8-sig", newline="\n") as text,
    ):
        yield text


def not_utf8(path: Path) -> ValueError:
    """Returns (does not raise) the error for a file that is not UTF-8, with the first such line."""
    number, remedy = 0, "save it as UTF-8"
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line[:2] in _UTF16:
                return ValueError(f"{path}: not UTF-8 text but UTF-16; {remedy}")
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                place = f"line {number}: byte {error.start} (0x{line[error.start]:02x})"
                return ValueError(f"{path}: {place} is not UTF-8 text; {remedy}")
    return ValueError(f"{path}: not UTF-8 text; {remedy}")


def read_lines(path: Path) -> list[str]:
    """Returns the lines of a text file without line ends. ValueError if it is unreadable or not UTF-8."""
    try:
        with open_bytes(path) as file:
            lines = file.read().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise not_utf8(path) from None
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def read_json_file(path: Path, remedy: Callable[[Path], str] | None = None) -> object:
    """Reads a JSON file, plain or compressed. Raises ValueError, with path and line, if that fails.

    Args:
        remedy: given the path, returns the end of the error message.
    """
    try:
        return read_json(path, _text_of)
    except ValueError as error:
        if remedy is None or not path.is_file():
            raise
        raise ValueError(f"{error}{remedy(path)}") from None


def _text_of(path: Path) -> str:
    if not path.is_file():
        return path.read_text()
    with open_bytes(path) as file:
        return file.read().decode("utf-8-sig")
