"""Turns one shard of a plan into a tar, or into the rows that describe a tar which stays as it is."""

import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from d2s.common.files import atomic_file, file_sha256, write_json
from d2s.shards.build.layout import Shard
from d2s.shards.build.listing import read_bytes
from d2s.shards.build.plan import Plan
from d2s.shards.format import manifest
from d2s.shards.format.pictures import Picture, check, measure
from d2s.shards.format.sample import Entry, Faults
from d2s.shards.format.tar import Member, TarFile

SCRATCH = ".build"
_PART_SCHEMA = manifest.schema().append(pa.field("crc32", pa.uint32()))


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a worker process needs to know.

    `in_place` leaves the tars as they are and puts the captions beside them; `decode` False then only reads the
    headers of the images.
    """

    out: Path
    plan: Path
    resize: int | None = None
    quality: int = 95
    quarantine: bool = False
    in_place: bool = False
    decode: bool = True


# One worker process works for one data set; set by its initializer.
_work: Work | None = None
_plan: Plan | None = None


def start(work: Work) -> None:
    """Prepares a worker process."""
    global _work, _plan
    _work, _plan = work, Plan(work.plan)


def part_path(out: Path, shard: Shard) -> Path:
    """Where the manifest rows of one finished shard wait for the others."""
    return out / SCRATCH / "parts" / (shard.name.removesuffix(".tar").replace("/", "-") + ".parquet")


def is_done(out: Path, shard: Shard) -> bool:
    """True if the shard was finished before the interruption, and is still there."""
    marker = part_path(out, shard).with_suffix(".json")
    if not marker.exists():
        return False
    facts = json.loads(marker.read_text(encoding="utf-8"))
    tar = out / shard.name
    return not facts["samples"] or (tar.is_file() and tar.stat().st_size == facts["bytes"])


def write_shard(shard: Shard) -> None:
    """Makes the shard, then its rows, then the marker that says that both are complete.

    Raises ValueError for an image that cannot be used, unless faults are quarantined.
    """
    assert _work is not None
    faults = Faults(_work.quarantine)
    taken = _taken(shard, faults)
    rows, size, sha256 = (_describe if _work.in_place else _write)(_work.out, shard, taken)
    part = part_path(_work.out, shard)
    with atomic_file(part) as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=_PART_SCHEMA), file)
    marker = {"samples": len(rows), "bytes": size, "sha256": sha256, "faults": faults.rows}
    write_json(part.with_suffix(".json"), marker)


def _taken(shard: Shard, faults: Faults) -> Iterator[tuple[Entry, Picture]]:
    """The samples of a shard whose images decode."""
    assert _work is not None
    assert _plan is not None
    for entry in _plan.entries(shard):
        try:
            if entry.number >= 0:
                from d2s.shards.sources.scenes import draw

                entry, data = draw(entry)
            else:
                data = read_bytes(entry)
            if _work.in_place:
                yield entry, check(data, convert=False) if _work.decode else measure(data)
            else:
                yield entry, check(data, _work.resize, _work.quality)
        except OSError as error:
            faults.add(entry.where, f"image {entry.path}: {error.strerror}", entry.key)
        except ValueError as error:
            faults.add(entry.where, f"image {entry.path}: {error}", entry.key)


def _row(shard: str, entry: Entry, picture: Picture) -> dict:
    return {
        "key": entry.key,
        "image_id": entry.image_id,
        "source_id": entry.source_id,
        "split": entry.split,
        "shard": shard,
        "sha256": hashlib.sha256(picture.data).hexdigest(),
        "width": picture.width,
        "height": picture.height,
        "sparse": list(entry.sparse),
        "dense": list(entry.dense),
    }


def _place(row: dict, image: Member, captions: Member, checksum: int) -> dict:
    row.update(image_offset=image.offset, image_size=image.size)
    row.update(json_offset=captions.offset, json_size=captions.size, crc32=checksum)
    return row


def _write(out: Path, shard: Shard, taken: Iterator[tuple[Entry, Picture]]) -> tuple[list[dict], int, str]:
    """Writes the tar; returns the manifest rows, the tar's size and its sha256."""
    path = out / shard.name
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    with atomic_file(path) as file:
        tar = TarFile(file)
        for entry, picture in taken:
            row = _row(shard.name, entry, picture)
            text = manifest.record(row)
            image = tar.add(f"{entry.key}.{picture.suffix}", picture.data)
            captions = tar.add(f"{entry.key}.json", text)
            rows.append(_place(row, image, captions, zlib.crc32(text, zlib.crc32(picture.data))))
        sha256 = tar.finish()
    if not rows:
        path.unlink()
    return rows, tar.size, sha256


def _describe(out: Path, shard: Shard, taken: Iterator[tuple[Entry, Picture]]) -> tuple[list[dict], int, str]:
    """Writes the captions of a tar that stays as it is; their offsets count from the start of this part."""
    rows, place = [], 0
    with atomic_file(part_path(out, shard).with_suffix(".jsonl")) as file:
        for entry, picture in taken:
            row = _row(shard.name, entry, picture)
            text = manifest.record(row)
            file.write(text + b"\n")
            image = Member("", entry.offset, entry.size)
            captions = Member("", place, len(text))
            rows.append(_place(row, image, captions, zlib.crc32(text, zlib.crc32(picture.data))))
            place += len(text) + 1
    path = out / shard.name
    return rows, path.stat().st_size, file_sha256(path)
