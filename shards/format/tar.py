"""Writes tar files whose bytes depend only on their members, and finds the members of any tar."""

import hashlib
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar: `size` bytes that begin at byte `offset` of the tar."""

    name: str
    offset: int
    size: int


def header(name: str, size: int) -> bytes:
    """Returns the 512 bytes before a member: plain ustar with time 0, owner 0 and mode 0644."""
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644
    data = info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
    assert len(data) == BLOCK, "keys are short enough for one header block"
    return data


def padding(size: int) -> bytes:
    """Returns the zeros that fill up the last block of a member of `size` bytes."""
    return bytes(-size % BLOCK)


def ending(size: int) -> bytes:
    """Returns the end of a tar of `size` bytes: two empty blocks, then zeros up to 10,240-byte records."""
    return bytes(2 * BLOCK + -(size + 2 * BLOCK) % tarfile.RECORDSIZE)


class TarFile:
    """Writes members into an open binary file and computes its sha256 at the same time."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.size = 0

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)

    def add(self, name: str, data: bytes) -> Member:
        """Appends a member and returns where it is stored."""
        self._write(header(name, len(data)))
        member = Member(name, self.size, len(data))
        self._write(data)
        self._write(padding(len(data)))
        return member

    def finish(self) -> str:
        """Writes the end of the tar and returns the sha256 of the whole file."""
        self._write(ending(self.size))
        return self._digest.hexdigest()


def leads_outside(name: str) -> bool:
    """Returns whether unpacking a member of this name could write outside the folder it is unpacked to."""
    parts = name.replace("\\", "/").split("/")
    return name.startswith(("/", "\\")) or ".." in parts or (len(parts[0]) == 2 and parts[0][1] == ":")


def scan(path: Path) -> Iterator[Member]:
    """Yields the regular files of an uncompressed tar, in the order of the tar.

    Raises:
        ValueError: the file is no tar or is cut short, or a member is a link, a device or leads outside.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            length = path.stat().st_size
            for info in tar:
                if leads_outside(info.name):
                    raise ValueError(f"{path}: member {info.name!r} leads outside of the tar; refused")
                if info.isdir():
                    continue
                if not info.isreg():
                    raise ValueError(f"{path}: member {info.name!r} is a link or device; refused")
                if info.offset_data + info.size > length:
                    raise ValueError(f"{path}: cut short within member {info.name!r}")
                yield Member(info.name, info.offset_data, info.size)
                # tarfile keeps every header that it reads. Clearing them limits the memory of a long scan.
                tar.members.clear()
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not a readable, uncompressed tar: {error}") from None


def split_name(name: str) -> tuple[str, str]:
    """Splits a name into key and suffix by the WebDataset rule: at the first dot of the file name."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()
