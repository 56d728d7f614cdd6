"""Checks one shard. Compares every byte of its tar, and its rows in the index, with its rows in the manifest."""

import hashlib
import mmap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from d2s.shards.format import manifest, tar
from d2s.shards.format.file_names import CHECKSUMS, INDEX, MANIFEST, SIDECAR
from d2s.shards.format.image_file import SUFFIXES, check_image
from d2s.shards.format.index_file import FROM_MANIFEST
from d2s.shards.format.keys import hash64

_Bytes = mmap.mmap | bytes


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault that was found in a file. `key` is the damaged sample's key, or "" if no sample is damaged."""

    file: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: {self.key + ': ' if self.key else ''}{self.reason}"


@dataclass(frozen=True, slots=True)
class RowGroup:
    """A row group of the manifest. It has `rows` rows, all of one shard. `start` is its first row in the manifest."""

    number: int
    start: int
    rows: int


@dataclass
class CheckedShard:
    """The result for one shard. Key hashes and image ids serve to find duplicates in different shards."""

    faults: list[Fault] = field(default_factory=list)
    shard: str = ""
    key_hashes: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))


def open_index(folder: Path) -> tuple[pa.RecordBatch | None, list[Fault]]:
    """Opens the index, memory-mapped. Returns (batch, []), or (None, [fault]) if it is missing or damaged."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(folder / INDEX)))
        return reader.get_batch(0), []
    except FileNotFoundError:
        return None, [Fault(INDEX, "", "missing")]
    except (pa.ArrowException, OSError) as error:
        return None, [Fault(INDEX, "", f"damaged: {str(error).splitlines()[0]}")]


@dataclass
class _DataSet:
    folder: Path
    checksums: dict[str, dict]
    decode: bool
    manifest: pq.ParquetFile
    index: pa.RecordBatch | None
    sidecar: _Bytes | None


# The data set that this process checks. It is set by `start_worker`.
_data: _DataSet | None = None


def start_worker(folder: Path, checksums: dict[str, dict], decode: bool, indexed: bool) -> None:
    """Opens a data set in this process. indexed: whether to check its index. decode: whether to decode images."""
    global _data
    index = open_index(folder)[0] if indexed else None
    sidecar = _map(folder / SIDECAR) if (folder / SIDECAR).exists() else None
    _data = _DataSet(folder, checksums, decode, pq.ParquetFile(folder / MANIFEST), index, sidecar)


def _map(path: Path) -> _Bytes:
    with open(path, "rb") as file:
        # An empty file cannot be mapped.
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""


def check_shard(group: RowGroup) -> CheckedShard:
    """Checks the tar and the index rows of the shard that `group` describes."""
    assert _data is not None
    try:
        table = _data.manifest.read_row_group(group.number)
    except (pa.ArrowException, OSError) as error:
        reason = f"row group {group.number} is damaged: {str(error).splitlines()[0]}"
        return CheckedShard([Fault(MANIFEST, "", reason)])
    rows = table.to_pylist()
    shard = rows[0]["shard"]
    keys = np.array([hash64(row["key"]) for row in rows], np.uint64)
    result = CheckedShard(shard=shard, key_hashes=keys, ids=table.column("image_id").to_numpy())
    crc32 = [None] * len(rows)
    if _data.index is not None:
        indexed = _data.index.slice(group.start, group.rows)
        crc32 = indexed.column("crc32").to_pylist()
        result.faults += _check_index_rows(table, indexed, rows)
    path = _data.folder / shard
    if path.is_file():
        result.faults += _check_tar(shard, _map(path), rows, crc32)
    else:
        result.faults.append(Fault(shard, "", "missing"))
    return result


def _check_index_rows(table: pa.Table, indexed: pa.RecordBatch, rows: list[dict]) -> Iterator[Fault]:
    columns = {name: table.column(name).to_numpy() for name in FROM_MANIFEST}
    for kind in ("sparse", "dense"):
        columns[f"n_{kind}"] = np.array([len(row[kind]) for row in rows])
    for name, values in columns.items():
        for place in np.flatnonzero(values != indexed.column(name).to_numpy()):
            yield Fault(INDEX, rows[place]["key"], f"{name} is not the manifest's")


def _check_tar(shard: str, data: _Bytes, rows: list[dict], crc32: list[int | None]) -> list[Fault]:
    """Returns the faults of a tar: of its samples and, if its checksum is wrong, of the bytes between samples."""
    assert _data is not None
    reasons = ((row["key"], _sample_fault(data, row, crc)) for row, crc in zip(rows, crc32, strict=True))
    faults = [Fault(shard, key, reason) for key, reason in reasons if reason]
    recorded = _data.checksums.get(shard)
    if recorded is None:
        if _data.checksums:
            faults.append(Fault(CHECKSUMS, "", f"no checksum of {shard}"))
        return faults
    same_size = len(data) == recorded["bytes"]
    if hashlib.sha256(data).hexdigest() == recorded["sha256"]:
        if not same_size:
            faults.append(Fault(CHECKSUMS, "", f"damaged: its size of {shard} is not the file's"))
        return faults
    if not same_size:
        faults.append(Fault(shard, "", f"{len(data):,} bytes, where the build wrote {recorded['bytes']:,}"))
    if _data.sidecar is None:
        faults += (Fault(shard, key, reason) for key, reason in _check_between(data, rows))
    if not faults:
        reason = f"its sha256 is not the one in {CHECKSUMS}, though every sample is undamaged"
        faults.append(Fault(shard, "", reason))
    return faults


def _sample_fault(data: _Bytes, row: dict, crc32: int | None) -> str | None:
    """Returns a text that says how a sample differs from manifest or index, or None if it is undamaged."""
    assert _data is not None
    image = data[row["image_offset"] : row["image_offset"] + row["image_size"]]
    home = data if _data.sidecar is None else _data.sidecar
    text = home[row["json_offset"] : row["json_offset"] + row["json_size"]]
    if len(image) != row["image_size"]:
        return "the image lies beyond the end of the tar"
    if hashlib.sha256(image).hexdigest() != row["sha256"]:
        return "the image's sha256 is not the manifest's"
    if text != manifest.record(row):
        return "the captions (JSON) are not the manifest's"
    if crc32 is not None and zlib.crc32(text, zlib.crc32(image)) != crc32:
        return f"the crc32 in {INDEX} is another"
    if _data.decode:
        try:
            check_image(image)
        except ValueError as error:
            return str(error)
    return None


def _check_between(data: _Bytes, rows: list[dict]) -> Iterator[tuple[str, str]]:
    """Yields (key, reason) for each header, padding or tar end that differs from the bytes that a build writes."""
    position = 0
    for row in rows:
        start = row["image_offset"]
        name = data[start - tar.BLOCK : start][:100].rstrip(b"\0").decode("ascii", "replace")
        suffix = name.removeprefix(f"{row['key']}.")
        image = f"{row['key']}.{suffix if suffix in SUFFIXES.values() else 'jpg'}"
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
