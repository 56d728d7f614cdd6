"""Writes a shard: a new tar, or (for `index`) only the captions and manifest rows of an existing tar."""

import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from d2s.common.files import atomic_file, file_sha256, write_json
from d2s.shards.build.assignment import Assignment
from d2s.shards.build.image_list import read_bytes
from d2s.shards.build.layout import Shard
from d2s.shards.build.settings import BuildConfig
from d2s.shards.format import manifest
from d2s.shards.format.file_names import SCRATCH
from d2s.shards.format.image_file import EncodedImage, check_header, check_image
from d2s.shards.format.tar import Member, TarFile
from d2s.shards.sources.entry import Entry
from d2s.shards.sources.faults import Faults
from d2s.shards.sources.scenes import draw

_PART_SCHEMA = manifest.schema().append(pa.field("crc32", pa.uint32()))


@dataclass(frozen=True)
class _Job:
    out: Path
    assignment: Assignment
    config: BuildConfig


# What this process works on; `start_worker` sets it.
_job: _Job | None = None


def start_worker(out: Path, assignment: Path, config: BuildConfig) -> None:
    """Prepares this process to write shards into `out`. assignment: folder of the stored `Assignment`."""
    global _job
    _job = _Job(out, Assignment(assignment), config)


def part_path(out: Path, shard: Shard) -> Path:
    """Returns the path for a shard's manifest rows. At the end of the build all such files are joined."""
    return out / SCRATCH / "parts" / (shard.name.removesuffix(".tar").replace("/", "-") + ".parquet")


def is_done(out: Path, shard: Shard) -> bool:
    """Returns whether an interrupted build finished this shard, and its tar still has the same size."""
    marker = part_path(out, shard).with_suffix(".json")
    if not marker.exists():
        return False
    facts = json.loads(marker.read_text(encoding="utf-8"))
    tar = out / shard.name
    return not facts["samples"] or (tar.is_file() and tar.stat().st_size == facts["bytes"])


def write_shard(shard: Shard) -> None:
    """Writes the shard, then its manifest rows, then a marker file that shows that both are complete.

    Raises ValueError if an image cannot be used, unless faults are quarantined.
    """
    assert _job is not None
    faults = Faults(_job.config.quarantine)
    images = _images(shard, faults)
    rows, size, sha256 = (_describe_tar if _job.config.in_place else _write_tar)(_job.out, shard, images)
    part = part_path(_job.out, shard)
    with atomic_file(part) as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=_PART_SCHEMA), file)
    marker = {"samples": len(rows), "bytes": size, "sha256": sha256, "faults": faults.rows}
    write_json(part.with_suffix(".json"), marker)


def _images(shard: Shard, faults: Faults) -> Iterator[tuple[Entry, EncodedImage]]:
    """Yields (entry, image) for each usable image of a shard. The others are added to `faults`."""
    assert _job is not None
    config = _job.config
    for entry in _job.assignment.entries(shard):
        try:
            entry, data = draw(entry) if entry.number >= 0 else (entry, read_bytes(entry))
            if not config.in_place:
                yield entry, check_image(data, config.resize, config.quality)
            elif config.decode:
                yield entry, check_image(data, convert=False)
            else:
                yield entry, check_header(data)
        except OSError as error:
            faults.add(entry.where, f"image {entry.path}: {error.strerror}", entry.key)
        except ValueError as error:
            faults.add(entry.where, f"image {entry.path}: {error}", entry.key)


def _row(shard: str, entry: Entry, image: EncodedImage) -> dict:
    """Returns the manifest row of a sample, without its offsets."""
    return {
        "key": entry.key,
        "image_id": entry.image_id,
        "source_id": entry.source_id,
        "split": entry.split,
        "shard": shard,
        "sha256": hashlib.sha256(image.data).hexdigest(),
        "width": image.width,
        "height": image.height,
        "sparse": list(entry.sparse),
        "dense": list(entry.dense),
    }


def _offsets(image: Member, captions: Member, checksum: int) -> dict:
    return {
        "image_offset": image.offset,
        "image_size": image.size,
        "json_offset": captions.offset,
        "json_size": captions.size,
        "crc32": checksum,
    }


def _write_tar(
    out: Path, shard: Shard, images: Iterator[tuple[Entry, EncodedImage]]
) -> tuple[list[dict], int, str]:
    """Writes the tar. Returns its manifest rows, its size in bytes, and its sha256."""
    path = out / shard.name
    rows = []
    with atomic_file(path) as file:
        tar = TarFile(file)
        for entry, image in images:
            row = _row(shard.name, entry, image)
            text = manifest.record(row)
            members = tar.add(f"{entry.key}.{image.suffix}", image.data), tar.add(f"{entry.key}.json", text)
            rows.append(row | _offsets(*members, zlib.crc32(text, zlib.crc32(image.data))))
        sha256 = tar.finish()
    if not rows:
        path.unlink()
    return rows, tar.size, sha256


def _describe_tar(
    out: Path, shard: Shard, images: Iterator[tuple[Entry, EncodedImage]]
) -> tuple[list[dict], int, str]:
    """Writes the captions of an existing tar to a JSON lines file. Returns the same as `_write_tar`."""
    rows, position = [], 0
    with atomic_file(part_path(out, shard).with_suffix(".jsonl")) as file:
        for entry, image in images:
            row = _row(shard.name, entry, image)
            text = manifest.record(row)
            file.write(text + b"\n")
            members = Member("", entry.offset, entry.size), Member("", position, len(text))
            rows.append(row | _offsets(*members, zlib.crc32(text, zlib.crc32(image.data))))
            position += len(text) + 1
    path = out / shard.name
    return rows, path.stat().st_size, file_sha256(path)
