"""Writes tars whose bytes depend only on the members. Reads any tar, and reports if it is incomplete."""

import hashlib
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self
from urllib.parse import quote

from d2s.common.messages import shorten

BLOCK = tarfile.BLOCKSIZE
_UNREADABLE = (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError)
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar, `size` bytes from `offset`. `fault` is the reason why it cannot be used, else ""."""

    name: str
    offset: int
    size: int
    fault: str = ""


class CutShort(ValueError):
    """The tar ends too early or is damaged. Earlier members are complete, but the last sample may not be.

    Attributes:
        member: name of the incomplete member; "" if the tar ends between two members.
    """

    def __init__(self, reason: str, member: str = "") -> None:
        super().__init__(reason)
        self.member = member


def header(name: str, size: int) -> bytes:
    """Returns the 512-byte ustar header of a member, with time 0, owner 0 and mode 0644."""
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644
    data = info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
    assert len(data) == BLOCK, "keys are short enough for one header block"
    return data


def padding(size: int) -> bytes:
    """Returns the zeros that follow a member of `size` bytes, up to a multiple of 512 bytes."""
    return bytes(-size % BLOCK)


def ending(size: int) -> bytes:
    """Returns the end of a tar with `size` bytes of members: zeros up to a multiple of 10,240 bytes."""
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


def printable_name(name: str) -> str:
    """Returns the name of a member as valid Unicode. Percent-encodes names that are not UTF-8."""
    if name.isascii() or name == name.encode("utf-8", "replace").decode():
        return name
    return quote(name.encode("utf-8", "surrogateescape"), safe="/ !#$&'()+,;=@[]~:{}")


def member_fault(info: tarfile.TarInfo) -> str:
    """Returns why a member cannot be used, or "" if it is a regular file with a safe name."""
    if _leads_outside(info.name):
        reason = "leads outside of the tar; refused"
    elif not info.isreg():
        reason = "is a link or device; refused (tar --hard-dereference stores the file itself)"
    elif info.issparse():
        reason = "is stored sparse; pack the tar without --sparse"
    else:
        return ""
    return f"member {_quoted(info.name)} {reason}"


def _leads_outside(name: str) -> bool:
    """Returns whether unpacking a member of this name could write outside the target folder."""
    if name.startswith(("/", "\\")) or name[1:3] in (":", ":/", ":\\"):
        return True
    return ".." in name and ".." in name.replace("\\", "/").split("/")


def _quoted(name: str) -> str:
    return shorten(repr(printable_name(name)), 100)


class _Header(tarfile.TarInfo):
    """Stores the error of the next header in `tar.last_error`, since `tarfile` only stops iterating."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            tar.last_error = error
            raise


def read_headers(file: BinaryIO, mode: str) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yields (tar, header) for each member that is not a folder, in order. `tar` reads the member's data.

    Args:
        mode: "r:" for a file with random access; "r|*" for a stream, compressed or not.
    Raises:
        CutShort: not a tar, or it is damaged, lacks its end, or has data after its end.
    """
    last = None
    try:
        with tarfile.open(fileobj=file, mode=mode, tarinfo=_Header, encoding="utf-8") as tar:
            for info in iter(tar.next, None):
                last = info
                if not info.isdir():
                    yield tar, info
                # tarfile keeps every header that it reads; clearing them bounds the memory of a long scan.
                tar.members.clear()
            if not isinstance(tar.last_error, tarfile.EOFHeaderError):
                invalid = isinstance(tar.last_error, tarfile.InvalidHeaderError)
                what = "damaged: no header of a member" if invalid else "cut short: no end of the archive"
                raise CutShort(f"{what} behind member {_quoted(last.name)}")
            while rest := tar.fileobj.read(_CHUNK):
                if rest.strip(b"\0"):
                    remedy = "unpack it with tar --ignore-zeros and pack it anew"
                    raise CutShort(f"of several joined by cat: more data follows its end; {remedy}")
    except _UNREADABLE as error:
        what = f"cut short or damaged behind member {_quoted(last.name)}" if last else "not a readable tar"
        raise CutShort(f"{what}: {type(error).__name__}: {shorten(str(error), 100)}") from None


def scan(path: Path) -> Iterator[Member]:
    """Yields the files in an uncompressed tar, in order, without reading their data.

    Raises:
        CutShort: as in `read_headers`.
        OSError: the tar cannot be opened.
    """
    with open(path, "rb") as file:
        length = path.stat().st_size
        if file.read(20).startswith(b"version https://git-"):
            raise CutShort("is a git-lfs pointer, not the tar itself: run git lfs pull")
        file.seek(0)
        for _, info in read_headers(file, "r:"):
            name = printable_name(info.name)
            fault = member_fault(info)
            if not fault and info.offset_data + info.size > length:
                raise CutShort(f"cut short within member {_quoted(info.name)}", name)
            yield Member(name, info.offset_data, info.size, fault)


def read_members(stream: BinaryIO) -> Iterator[tuple[str, bytes, str]]:
    """Yields (name, data, fault) for each file in a tar from a stream, compressed or not.

    Raises:
        CutShort: as in `read_headers`.
    """
    for tar, info in read_headers(stream, "r|*"):
        name, fault = printable_name(info.name), member_fault(info)
        try:
            data = b"" if fault else tar.extractfile(info).read()
        except _UNREADABLE as error:
            what = f"cut short or damaged within member {_quoted(info.name)}"
            raise CutShort(f"{what}: {shorten(str(error), 100)}", name) from None
        yield name, data, fault
