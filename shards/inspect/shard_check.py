"""Checks one shard against its manifest rows: every byte of the tar, and its slice of the index."""

import hashlib
import mmap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from d2s.shards.build.data_set import CHECKSUMS, SIDECAR
from d2s.shards.format import manifest, tar
from d2s.shards.format.index_file import NAME as INDEX
from d2s.shards.format.pictures import IMAGE_SUFFIXES, check
from d2s.shards.format.sample import hash64

_COPIED = ("image_offset", "image_size", "json_offset", "json_size", "image_id")


@dataclass(frozen=True, slots=True)
class Fault:
    """Something wrong in a file, and with which sample where that is known."""

    file: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: {self.key + ': ' if self.key else ''}{self.reason}"


@dataclass
class Checked:
    """What a worker says about one row group: its faults, and what the whole is put together from."""

    faults: list[Fault] = field(default_factory=list)
    shard: str = ""
    split: str = ""
    rows: int = 0
    keys: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))


@dataclass(frozen=True, slots=True)
class Task:
    """A row group of the manifest: its number, its first row, its rows."""

    group: int
    start: int
    rows: int


def open_index(folder: Path) -> tuple[pa.RecordBatch | None, list[Fault]]:
    """The index as one memory-mapped record batch, or what is wrong with it."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(folder / INDEX)))
        return reader.get_batch(0), []
    except FileNotFoundError:
        return None, [Fault(INDEX, "", "missing")]
    except (pa.ArrowException, OSError) as error:
        return None, [Fault(INDEX, "", f"damaged: {str(error).splitlines()[0]}")]


# What one worker process has open; set by its initializer.
_open: "_Open | None" = None


@dataclass
class _Open:
    folder: Path
    files: dict[str, dict]
    decode: bool
    groups: pq.ParquetFile
    index: pa.RecordBatch | None
    sidecar: mmap.mmap | None


def start(folder: Path, files: dict[str, dict], decode: bool, indexed: bool) -> None:
    """Prepares a worker process."""
    global _open
    index = open_index(folder)[0] if indexed else None
    sidecar = _map(folder / SIDECAR) if (folder / SIDECAR).exists() else None
    _open = _Open(folder, files, decode, pq.ParquetFile(folder / manifest.NAME), index, sidecar)


def _map(path: Path) -> mmap.mmap | bytes:
    with open(path, "rb") as file:
        # An empty file cannot be mapped.
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""


def check_shard(task: Task) -> Checked:
    """Checks one row group: its tar, and its slice of the index."""
    assert _open is not None
    try:
        table = _open.groups.read_row_group(task.group)
    except (pa.ArrowException, OSError) as error:
        reason = f"row group {task.group} is damaged: {str(error).splitlines()[0]}"
        return Checked([Fault(manifest.NAME, "", reason)], rows=task.rows)
    rows = table.to_pylist()
    shard = rows[0]["shard"]
    result = Checked(shard=shard, split=rows[0]["split"], rows=len(rows))
    result.keys = np.array([hash64(row["key"]) for row in rows], np.uint64)
    result.ids = table.column("image_id").to_numpy()
    if any(row["shard"] != shard or row["split"] != result.split for row in rows):
        result.faults.append(Fault(manifest.NAME, "", f"row group {task.group} mixes shards or splits"))
    checksums = None
    if _open.index is not None:
        part = _open.index.slice(task.start, task.rows)
        checksums = part.column("crc32").to_numpy()
        result.faults += _compare(table, part, rows)
    path = _open.folder / shard
    if not path.is_file():
        result.faults.append(Fault(shard, "", "missing"))
        return result
    result.faults += _tar_faults(shard, _map(path), rows, checksums)
    return result


def _compare(table: pa.Table, part: pa.RecordBatch, rows: list[dict]) -> Iterator[Fault]:
    columns = {name: table.column(name).to_numpy() for name in _COPIED}
    for kind in ("sparse", "dense"):
        columns[f"n_{kind}"] = np.array([len(row[kind]) for row in rows])
    for name, values in columns.items():
        for place in np.flatnonzero(values != part.column(name).to_numpy()):
            yield Fault(INDEX, rows[place]["key"], f"{name} is not the manifest's")


def _tar_faults(
    shard: str, data: mmap.mmap | bytes, rows: list[dict], checksums: np.ndarray | None
) -> list[Fault]:
    assert _open is not None
    faults: list[Fault] = []
    for number, row in enumerate(rows):
        reason = _sample_fault(data, row, None if checksums is None else int(checksums[number]))
        if reason:
            faults.append(Fault(shard, row["key"], reason))
    recorded = _open.files.get(shard)
    if recorded is None:
        if _open.files:
            faults.append(Fault(CHECKSUMS, "", f"no checksum of {shard}"))
        return faults
    if hashlib.sha256(data).hexdigest() == recorded["sha256"]:
        if len(data) != recorded["bytes"]:
            faults.append(Fault(CHECKSUMS, "", f"damaged: its size of {shard} is not the file's"))
        return faults
    if len(data) != recorded["bytes"]:
        faults.append(Fault(shard, "", f"{len(data):,} bytes, where the build wrote {recorded['bytes']:,}"))
    if _open.sidecar is None:
        faults += (Fault(shard, key, reason) for key, reason in _between(data, rows))
    if not faults:
        faults.append(
            Fault(shard, "", f"its sha256 is not the one in {CHECKSUMS}, though every sample is whole")
        )
    return faults


def _sample_fault(data: mmap.mmap | bytes, row: dict, checksum: int | None) -> str | None:
    """Why a sample is not what the manifest says, or None."""
    assert _open is not None
    image = data[row["image_offset"] : row["image_offset"] + row["image_size"]]
    home = data if _open.sidecar is None else _open.sidecar
    text = home[row["json_offset"] : row["json_offset"] + row["json_size"]]
    if len(image) != row["image_size"]:
        return "the image lies beyond the end of the tar"
    if hashlib.sha256(image).hexdigest() != row["sha256"]:
        return "the image's sha256 is not the manifest's"
    if text != manifest.record(row):
        return "the captions (JSON) are not the manifest's"
    if checksum is not None and zlib.crc32(text, zlib.crc32(image)) != checksum:
        return f"the crc32 in {INDEX} is another"
    if _open.decode:
        try:
            check(image)
        except ValueError as error:
            return str(error)
    return None


def _between(data: mmap.mmap | bytes, rows: list[dict]) -> Iterator[tuple[str, str]]:
    """Compares all that lies between the members with what a build writes: headers, padding, the end."""
    position = 0
    for row in rows:
        start = row["image_offset"]
        name = data[start - tar.BLOCK : start][:100].rstrip(b"\0").decode("ascii", "replace")
        suffix = name.removeprefix(f"{row['key']}.")
        image = f"{row['key']}.{suffix if suffix in IMAGE_SUFFIXES else 'jpg'}"
        for member, kind in ((image, "image"), (f"{row['key']}.json", "json")):
            offset, size = row[f"{kind}_offset"], row[f"{kind}_size"]
            if data[position:offset] != tar.header(member, size):
                yield row["key"], f"the tar header of {member} is damaged"
            position = offset + size
            if data[position : position + -size % tar.BLOCK] != tar.padding(size):
                yield row["key"], f"the padding after {member} is not empty"
            position += -size % tar.BLOCK
    if data[position:] != tar.ending(position):
        yield "", "the end of the tar is damaged"
