"""Looks for damage: every byte of every tar, every row of the files that describe them, and how they agree."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from d2s.common.files import file_sha256, read_json
from d2s.common.process_map import map_ordered
from d2s.common.progress import Progress, track
from d2s.shards.build.data_set import CHECKSUMS, SIDECAR, SIZES
from d2s.shards.format import manifest
from d2s.shards.format.index_file import NAME as INDEX
from d2s.shards.inspect.verify_shard import Checked, Fault, Task, check_shard, open_index, start


def verify(folder: Path, workers: int = 1, decode: bool = True) -> Iterator[Fault]:
    """Checks a data set and yields each fault.

    Raises:
        ValueError: there is no manifest, or it cannot be read: then nothing can be checked against it.
    """
    if not (folder / manifest.NAME).is_file():
        manifest.read_manifest(folder)
    files, faults = _checksums(folder)
    yield from faults
    damaged = {fault.file for fault in faults}
    if manifest.NAME in damaged:
        # What a damaged manifest says is worth nothing: whole tars are all that can still be checked.
        yield from _tars_alone(folder, files)
        return
    groups = manifest.open_manifest(folder)
    index, faults = open_index(folder) if INDEX not in damaged else (None, [])
    yield from faults
    if index is not None and index.num_rows != groups.metadata.num_rows:
        yield Fault(INDEX, "", f"{index.num_rows} rows, but the manifest has {groups.metadata.num_rows}")
        index = None
    tasks = _tasks(groups)
    results = map_ordered(check_shard, tasks, workers, start, (folder, files, decode, index is not None))
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
        recorded = read_json(folder / CHECKSUMS)
        files, version = recorded["files"], recorded["version"]
        broken = [name for name, facts in files.items() if len(facts["sha256"]) != 64 or facts["bytes"] < 0]
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}, [Fault(CHECKSUMS, "", "damaged: not the JSON that a build writes")]
    faults = [Fault(CHECKSUMS, "", f"damaged: no checksum of {name}") for name in broken]
    if version != 1:
        faults.append(Fault(CHECKSUMS, "", f"damaged: its version is {version!r}, not 1"))
    for name, facts in files.items():
        if name.endswith(".tar"):
            continue
        if not (folder / name).is_file():
            faults.append(Fault(name, "", "missing"))
        elif file_sha256(folder / name) != facts["sha256"]:
            faults.append(Fault(name, "", f"damaged: its sha256 is not the one in {CHECKSUMS}"))
        elif (folder / name).stat().st_size != facts["bytes"]:
            faults.append(Fault(CHECKSUMS, "", f"damaged: its size of {name} is not the file's"))
    return files, faults


def _tars_alone(folder: Path, files: dict[str, dict]) -> Iterator[Fault]:
    for name, facts in files.items():
        if not name.endswith(".tar"):
            continue
        if not (folder / name).is_file():
            yield Fault(name, "", "missing")
        elif file_sha256(folder / name) != facts["sha256"]:
            yield Fault(name, "", f"damaged: its sha256 is not the one in {CHECKSUMS}")


def _tasks(groups: pq.ParquetFile) -> list[Task]:
    tasks, first = [], 0
    for number in range(groups.num_row_groups):
        rows = groups.metadata.row_group(number).num_rows
        tasks.append(Task(number, first, rows))
        first += rows
    return tasks


def _whole(
    folder: Path, files: dict[str, dict], index: pa.RecordBatch | None, done: list[Checked]
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
