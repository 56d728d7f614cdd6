"""Looks for damage: every byte of every tar, every row of the files that describe them, and how they agree."""

import hashlib
import json
import mmap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from d2s.shards import manifest, tar
from d2s.shards.build import CHECKSUMS, SIDECAR, SIZES
from d2s.shards.files import file_sha256, read_json
from d2s.shards.index_file import NAME as INDEX
from d2s.shards.pictures import IMAGE_SUFFIXES, check
from d2s.shards.progress import Progress, track
from d2s.shards.sample import hash64
from d2s.shards.workers import map_ordered

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
class _Checked:
    """What a worker says about one row group: its faults, and what the whole is put together from."""

    faults: list[Fault] = field(default_factory=list)
    shard: str = ""
    split: str = ""
    rows: int = 0
    keys: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))


@dataclass(frozen=True, slots=True)
class _Task:
    group: int
    start: int
    rows: int


def verify(folder: Path, workers: int = 1, decode: bool = True) -> Iterator[Fault]:
    """Checks a data set and yields each fault.

    Raises:
        ValueError: there is no manifest, or it cannot be read: then nothing can be checked against it.
    """
    if not (folder / manifest.NAME).is_file():
        manifest.read_manifest(folder)
    files, faults = _checksums(folder)
    yield from faults
    try:
        groups = pq.ParquetFile(folder / manifest.NAME)
        tasks = _tasks(groups)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{folder / manifest.NAME}: damaged: {str(error).splitlines()[0]}") from None
    index, faults = _open_index(folder)
    yield from faults
    if index is not None and index.num_rows != groups.metadata.num_rows:
        yield Fault(INDEX, "", f"{index.num_rows} rows, but the manifest has {groups.metadata.num_rows}")
        index = None
    results = map_ordered(_check, tasks, workers, _start, (folder, files, decode, index is not None))
    counted = ((task.rows, result) for task, result in results)
    done = []
    for result in track(counted, Progress("verify", groups.metadata.num_rows)):
        yield from result.faults
        done.append(result)
    yield from _whole(folder, files, index, done)


def _checksums(folder: Path) -> tuple[dict[str, dict], list[Fault]]:
    """The recorded checksums, after a check of the files that are no tars; tars are the workers' part."""
    if not (folder / CHECKSUMS).is_file():
        return {}, [Fault(CHECKSUMS, "", "missing: the build did not finish")]
    try:
        files = read_json(folder / CHECKSUMS)["files"]
        broken = [name for name, facts in files.items() if len(facts["sha256"]) != 64 or facts["bytes"] < 0]
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}, [Fault(CHECKSUMS, "", "damaged: not the JSON that a build writes")]
    faults = [Fault(CHECKSUMS, "", f"damaged: no checksum of {name}") for name in broken]
    for name, facts in files.items():
        if name.endswith(".tar"):
            continue
        if not (folder / name).is_file():
            faults.append(Fault(name, "", "missing"))
        elif file_sha256(folder / name) != facts["sha256"]:
            faults.append(Fault(name, "", f"damaged: its sha256 is not the one in {CHECKSUMS}"))
    return files, faults


def _open_index(folder: Path) -> tuple[pa.RecordBatch | None, list[Fault]]:
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(folder / INDEX)))
        return reader.get_batch(0), []
    except FileNotFoundError:
        return None, [Fault(INDEX, "", "missing")]
    except (pa.ArrowInvalid, OSError) as error:
        return None, [Fault(INDEX, "", f"damaged: {str(error).splitlines()[0]}")]


def _tasks(groups: pq.ParquetFile) -> list[_Task]:
    tasks, start = [], 0
    for number in range(groups.num_row_groups):
        rows = groups.metadata.row_group(number).num_rows
        tasks.append(_Task(number, start, rows))
        start += rows
    return tasks


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


def _start(folder: Path, files: dict[str, dict], decode: bool, indexed: bool) -> None:
    global _open
    index = _open_index(folder)[0] if indexed else None
    sidecar = _map(folder / SIDECAR) if (folder / SIDECAR).exists() else None
    _open = _Open(folder, files, decode, pq.ParquetFile(folder / manifest.NAME), index, sidecar)


def _map(path: Path) -> mmap.mmap | bytes:
    with open(path, "rb") as file:
        # An empty file cannot be mapped.
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""


def _check(task: _Task) -> _Checked:
    """Checks one row group: its tar, and its slice of the index."""
    assert _open is not None
    try:
        table = _open.groups.read_row_group(task.group)
    except (pa.ArrowInvalid, OSError) as error:
        reason = f"row group {task.group} is damaged: {str(error).splitlines()[0]}"
        return _Checked([Fault(manifest.NAME, "", reason)], rows=task.rows)
    rows = table.to_pylist()
    shard = rows[0]["shard"]
    result = _Checked(shard=shard, split=rows[0]["split"], rows=len(rows))
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


def _whole(
    folder: Path, files: dict[str, dict], index: pa.RecordBatch | None, done: list[_Checked]
) -> Iterator[Fault]:
    """What only all shards together can show."""
    counts: dict[str, int] = {}
    splits: dict[str, list[int]] = {}
    total = 0
    for part in done:
        counts[part.shard] = counts.get(part.shard, 0) + part.rows
        splits.setdefault(part.split, [total, total])[1] = total + part.rows
        total += part.rows
    try:
        if read_json(folder / SIZES) != counts:
            yield Fault(SIZES, "", "its counts are not the manifest's")
    except ValueError as error:
        yield Fault(SIZES, "", str(error))
    if index is not None:
        yield from _index_faults(folder, index, list(counts), splits)
    present = {
        path.relative_to(folder).as_posix() for path in [*folder.glob("*.tar"), *folder.glob("*/*.tar")]
    }
    for name in sorted(present - set(counts)):
        yield Fault(name, "", "is no part of the data set: the manifest does not know it")
    for name in sorted(name for name in files if name.endswith(".tar") and name not in counts):
        yield Fault(name, "", "has a checksum, but no rows in the manifest")
    for column, values in (("key", [part.keys for part in done]), ("image_id", [part.ids for part in done])):
        _, where, times = np.unique(np.concatenate(values), return_index=True, return_counts=True)
        for place in where[times > 1]:
            row = _row(folder, int(place))
            yield Fault(manifest.NAME, row["key"], f"{column} {row[column]!r} stands there more than once")


def _row(folder: Path, number: int) -> dict:
    groups = pq.ParquetFile(folder / manifest.NAME)
    for group in range(groups.num_row_groups):
        rows = groups.metadata.row_group(group).num_rows
        if number < rows:
            return groups.read_row_group(group, columns=["key", "image_id"]).slice(number, 1).to_pylist()[0]
        number -= rows
    raise AssertionError("a row that was just read is there")


def _index_faults(
    folder: Path, index: pa.RecordBatch, shards: list[str], splits: dict[str, list[int]]
) -> Iterator[Fault]:
    try:
        meta = json.loads((index.schema.metadata or {}).get(b"d2s", b"null")) or {}
    except ValueError:
        meta = {}
    home = "sidecar" if (folder / SIDECAR).exists() else "tar"
    for name, value in (("shards", shards), ("splits", splits), ("json", home), ("version", 1)):
        if meta.get(name) != value:
            yield Fault(INDEX, "", f"its {name} are not the manifest's")
    numbers = index.column("shard").to_numpy()
    if not (numbers.min() >= 0 and numbers.max() < len(shards)):
        yield Fault(INDEX, "", "it names a shard that does not exist")
    for kind in ("sparse", "dense"):
        counts = index.column(f"n_{kind}").to_numpy()
        if not np.array_equal(
            np.cumsum(counts, dtype=np.int64) - counts, index.column(f"{kind}_start").to_numpy()
        ):
            yield Fault(INDEX, "", f"{kind}_start is not the running total of n_{kind}")
