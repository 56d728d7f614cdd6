"""Checks every byte of a data set for damage. Also checks that manifest, index and tars match in every sample."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from d2s.common.files import file_sha256, read_json
from d2s.common.process_map import map_ordered
from d2s.common.progress import track
from d2s.shards.format import manifest
from d2s.shards.format.file_names import CHECKSUMS, INDEX, MANIFEST
from d2s.shards.inspect.shard_check import (
    CheckedShard,
    Fault,
    RowGroup,
    check_shard,
    open_index,
    start_worker,
)


def verify(folder: Path, workers: int = 1, decode: bool = True) -> Iterator[Fault]:
    """Checks a data set and yields every fault that it finds.

    Args:
        workers: number of processes.
        decode: whether to decode every image. If False, an image passes if its checksum is correct.
    Raises:
        ValueError: the manifest is missing or cannot be read.
    """
    if not (folder / MANIFEST).is_file():
        manifest.read_manifest(folder)
    files, faults = _read_checksums(folder)
    yield from faults
    damaged = {fault.file for fault in faults}
    if MANIFEST in damaged:
        # With a damaged manifest, samples cannot be found in the tars. So only the tars' checksums are checked.
        yield from _check_files(folder, {name: facts for name, facts in files.items() if _is_tar(name)})
        return
    groups = manifest.open_manifest(folder)
    index, faults = open_index(folder) if INDEX not in damaged else (None, [])
    yield from faults
    rows = groups.metadata.num_rows
    if index is not None and index.num_rows != rows:
        yield Fault(INDEX, "", f"{index.num_rows} rows, but the manifest has {rows}")
        index = None
    context = (folder, files, decode, index is not None)
    results = map_ordered(check_shard, _row_groups(groups), workers, start_worker, context)
    checked = []
    for result in track(((group.rows, result) for group, result in results), "verify", rows):
        yield from result.faults
        checked.append(result)
    yield from _check_across_shards(folder, checked)


def _is_tar(name: str) -> bool:
    return name.endswith(".tar")


def _read_checksums(folder: Path) -> tuple[dict[str, dict], list[Fault]]:
    """Returns the content of checksums.json, and the faults of all files except tars. `check_shard` checks tars."""
    if not (folder / CHECKSUMS).is_file():
        return {}, [Fault(CHECKSUMS, "", "missing: the build did not finish")]
    try:
        recorded = read_json(folder / CHECKSUMS)
        version = recorded["version"]
        files = {
            name: {k: facts[k] for k in ("bytes", "sha256")} for name, facts in recorded["files"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}, [Fault(CHECKSUMS, "", "damaged: not the JSON that a build writes")]
    faults = []
    if version != 1:
        faults.append(Fault(CHECKSUMS, "", f"damaged: its version is {version!r}, not 1"))
    others = {name: facts for name, facts in files.items() if not _is_tar(name)}
    return files, [*faults, *_check_files(folder, others)]


def _check_files(folder: Path, files: dict[str, dict]) -> Iterator[Fault]:
    """Yields a fault for each file that is missing, or that differs from its recorded size or checksum."""
    for name, facts in files.items():
        if not (folder / name).is_file():
            yield Fault(name, "", "missing")
        elif file_sha256(folder / name) != facts["sha256"]:
            yield Fault(name, "", f"damaged: its sha256 is not the one in {CHECKSUMS}")
        elif (folder / name).stat().st_size != facts["bytes"]:
            yield Fault(CHECKSUMS, "", f"damaged: its size of {name} is not the file's")


def _row_groups(groups: pq.ParquetFile) -> list[RowGroup]:
    found, first = [], 0
    for number in range(groups.num_row_groups):
        rows = groups.metadata.row_group(number).num_rows
        found.append(RowGroup(number, first, rows))
        first += rows
    return found


def _check_across_shards(folder: Path, checked: list[CheckedShard]) -> Iterator[Fault]:
    """Yields a fault for each tar that the manifest does not name, and for each repeated key or image id."""
    tars = {path.relative_to(folder).as_posix() for path in [*folder.glob("*.tar"), *folder.glob("*/*.tar")]}
    for name in sorted(tars - {part.shard for part in checked}):
        yield Fault(name, "", "is no part of the data set: the manifest does not know it")
    columns = {"key": [part.key_hashes for part in checked], "image_id": [part.ids for part in checked]}
    with pq.ParquetFile(folder / MANIFEST) as file:
        for column, values in columns.items():
            _, first, times = np.unique(np.concatenate(values), return_index=True, return_counts=True)
            for number in first[times > 1].tolist():
                row = manifest.read_row(file, number, ["key", "image_id"])
                yield Fault(MANIFEST, row["key"], f"{column} {row[column]!r} stands there more than once")
