"""Writes a data set: a plan, then shard after shard, then what describes them all."""

import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from d2s.shards import manifest
from d2s.shards.dense import DenseOptions
from d2s.shards.files import file_sha256, read_json, whole_file, write_json
from d2s.shards.index_file import IndexWriter
from d2s.shards.pictures import Picture, check
from d2s.shards.plan import Plan, Shard, ShardSize, digest, make_plan, read_bytes
from d2s.shards.progress import Progress, track
from d2s.shards.sample import Entry, Faults
from d2s.shards.tar import TarFile
from d2s.shards.workers import map_unordered

SCRATCH = ".build"
CHECKSUMS = "checksums.json"
SIZES = "sizes.json"
SETTINGS = "build.json"
QUARANTINE = "quarantine.jsonl"


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """What decides the bytes of a data set, besides its input."""

    source: str
    resize: int | None = None
    """shrink the shorter side of larger images to so many pixels"""
    quality: int = 95
    """JPEG quality of images that are re-encoded, 1 to 100"""
    shard_size: ShardSize = ShardSize()
    seed: int = 0
    """of the order within each split"""
    quarantine: bool = False
    """list and leave out bad input instead of stopping at it"""

    def __post_init__(self) -> None:
        if self.resize is not None and self.resize < 16:
            raise ValueError(f"resize={self.resize} is too small; 16 pixels at least")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality={self.quality} is out of range; 1 to 100, 95 by default")


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """What a build has made: samples a split, shards, bytes of the tars, input that was left out."""

    samples: dict[str, int]
    shards: int
    bytes: int
    quarantined: int
    extra: int


# One worker process writes for one build; set by its initializer.
_writer: "ShardWriter | None" = None


class ShardWriter:
    """Writes single shards of a plan, in any process and any order."""

    def __init__(self, out: Path, config: BuildConfig) -> None:
        self._out, self._config = out, config
        self._plan = Plan(out / SCRATCH)

    def write(self, shard: Shard) -> None:
        """Writes the tar, then its rows, then the marker that says that both are complete."""
        faults = Faults(self._config.quarantine)
        path = self._out / shard.name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = []
        with whole_file(path) as file:
            tar = TarFile(file)
            for entry in self._plan.entries(shard):
                taken = self._take(entry, faults)
                if taken is not None:
                    rows.append(_store(tar, shard.name, *taken))
            sha256 = tar.finish()
        if not rows:
            path.unlink()
        part = part_path(self._out, shard)
        form = manifest.schema().append(pa.field("crc32", pa.uint32()))
        with whole_file(part) as file:
            pq.write_table(pa.Table.from_pylist(rows, schema=form), file)
        marker = {"samples": len(rows), "bytes": tar.size, "sha256": sha256, "faults": faults.rows}
        write_json(part.with_suffix(".json"), marker)

    def _take(self, entry: Entry, faults: Faults) -> tuple[Entry, Picture] | None:
        if entry.number >= 0:
            from d2s.shards.sources.scenes import draw

            entry, data = draw(entry)
        else:
            try:
                data = read_bytes(entry)
            except OSError as error:
                faults.add(entry.where, f"image {entry.path}: {error.strerror}", entry.key)
                return None
        try:
            return entry, check(data, self._config.resize, self._config.quality)
        except ValueError as error:
            faults.add(entry.where, f"image {entry.path}: {error}", entry.key)
            return None


def _store(tar: TarFile, shard: str, entry: Entry, picture: Picture) -> dict:
    import hashlib

    row = {
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
    text = manifest.record(row)
    image = tar.add(f"{entry.key}.{picture.suffix}", picture.data)
    captions = tar.add(f"{entry.key}.json", text)
    row.update(image_offset=image.offset, image_size=image.size)
    row.update(json_offset=captions.offset, json_size=captions.size)
    row["crc32"] = zlib.crc32(text, zlib.crc32(picture.data))
    return row


def part_path(out: Path, shard: Shard) -> Path:
    """Where the manifest rows of one finished shard wait for the others."""
    return out / SCRATCH / "parts" / (shard.name.removesuffix(".tar").replace("/", "-") + ".parquet")


def _start(out: Path, config: BuildConfig) -> None:
    global _writer
    _writer = ShardWriter(out, config)


def _work(shard: Shard) -> None:
    assert _writer is not None
    _writer.write(shard)


def open_output(out: Path, resume: bool) -> bool:
    """Makes the output folder ready; True if a complete data set lies there already.

    Raises ValueError if something lies there that this build must not touch.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file, not a folder")
    held = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if held and not resume:
        hint = "; --resume continues the build that was interrupted there" if SCRATCH in held else ""
        raise ValueError(f"--out {out}: not empty (holds {held[0]}){hint or '; choose another folder'}")
    if held and SCRATCH not in held:
        if CHECKSUMS in held and SETTINGS in held:
            return True
        raise ValueError(f"--out {out}: holds {held[0]}, but no interrupted build to resume")
    (out / SCRATCH).mkdir(parents=True, exist_ok=True)
    return False


def build(
    entries: Iterable[Entry],
    out: Path,
    config: BuildConfig,
    *,
    dense: DenseOptions | None = None,
    facts: dict | None = None,
    faults: Faults | None = None,
    workers: int = 1,
    resume: bool = False,
) -> BuildReport:
    """Builds a data set from a source's entries.

    Args:
        entries: the source, whose own faults go to `faults`.
        facts: what build.json says about the input, beside the settings.
        workers: processes; the output does not depend on it.

    Raises:
        ValueError: bad input (one line), an output folder in use, or other input than the interrupted build's.
    """
    faults = faults or Faults(config.quarantine)
    if open_output(out, resume):
        raise ValueError(f"--out {out}: a complete data set lies there already; nothing to resume")
    scratch = out / SCRATCH
    with open(scratch / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--out {out}: another build is writing there now") from None
        try:
            plan = make_plan(
                scratch, entries, dense=dense, shard_size=config.shard_size, seed=config.seed, faults=faults
            )
            settings = {"version": 1, **asdict(config), **(facts or {})}
            _same_build(scratch, settings)
        except ValueError:
            _leave_no_trace(out)
            raise
        _write_shards(plan, out, config, workers)
        report = _finish(plan, out, settings, faults)
    shutil.rmtree(scratch)
    return report


def _same_build(scratch: Path, settings: dict) -> None:
    """Remembers what is being built; a resumed build has to be the same one."""
    path = scratch / "settings.json"
    now = {"settings": json.loads(json.dumps(settings)), "plan": digest(scratch)}
    if path.exists() and read_json(path) != now:
        raise ValueError(
            f"{scratch.parent}: input or options changed since this build was interrupted; delete it"
        )
    write_json(path, now)


def _leave_no_trace(out: Path) -> None:
    """A build refused before its first shard leaves no folder behind that would be in the way of the next."""
    if not (out / SCRATCH / "settings.json").exists():
        shutil.rmtree(out / SCRATCH)
        if not any(out.iterdir()):
            out.rmdir()


def _write_shards(plan: Plan, out: Path, config: BuildConfig, workers: int) -> None:
    todo = [shard for shard in plan.shards if not _is_done(out, shard)]
    total = sum(shard.stop - shard.start for shard in todo)
    results = map_unordered(_work, todo, workers, _start, (out, config))
    counted = ((shard.stop - shard.start, shard) for shard, _ in results)
    for _ in track(counted, Progress("shards", total)):
        pass


def _is_done(out: Path, shard: Shard) -> bool:
    marker = part_path(out, shard).with_suffix(".json")
    if not marker.exists():
        return False
    facts = json.loads(marker.read_text(encoding="utf-8"))
    tar = out / shard.name
    return not facts["samples"] or (tar.is_file() and tar.stat().st_size == facts["bytes"])


def _finish(plan: Plan, out: Path, settings: dict, faults: Faults) -> BuildReport:
    """Joins the shards' rows into the files that describe the whole; checksums.json last, as the marker."""
    parts = [(shard, part_path(out, shard)) for shard in plan.shards]
    markers = {shard.name: read_json(part.with_suffix(".json")) for shard, part in parts}
    samples = dict.fromkeys(plan.counts, 0)
    for shard, _ in parts:
        samples[shard.name.split("/")[0]] += markers[shard.name]["samples"]
        faults.rows.extend(markers[shard.name]["faults"])
    for split, count in samples.items():
        if not count:
            raise ValueError(f"split {split!r} is empty: every one of its images was left out")
    parts = [(shard, part) for shard, part in parts if markers[shard.name]["samples"]]
    write_description(out, [part for _, part in parts], sum(samples.values()), out / SCRATCH)
    write_json(out / SIZES, {shard.name: markers[shard.name]["samples"] for shard, _ in parts})
    write_json(out / SETTINGS, settings)
    if faults.rows:
        with whole_file(out / QUARANTINE) as file:
            for row in faults.rows:
                file.write(json.dumps(row, ensure_ascii=False, sort_keys=True).encode() + b"\n")
    tars = {shard.name: markers[shard.name] for shard, _ in parts}
    write_checksums(out, {name: {"bytes": m["bytes"], "sha256": m["sha256"]} for name, m in tars.items()})
    return BuildReport(
        samples=samples,
        shards=len(parts),
        bytes=sum(marker["bytes"] for marker in tars.values()),
        quarantined=len(faults.rows),
        extra=plan.extra,
    )


def write_description(out: Path, parts: list[Path], rows: int, scratch: Path, json_home: str = "tar") -> None:
    """Writes manifest.parquet and index.arrow from the rows of each shard, one shard in memory at a time."""
    index = IndexWriter(rows, scratch)
    with whole_file(out / manifest.NAME) as file, manifest.open_writer(file) as writer:
        for part in parts:
            table = pq.read_table(part)
            crc32 = table.column("crc32").to_numpy().astype(np.uint32)
            table = table.drop_columns(["crc32"])
            writer.write_table(table, row_group_size=table.num_rows)
            index.add(table, crc32)
    index.finish(out, json_home)


def write_checksums(out: Path, tars: dict[str, dict]) -> None:
    """Writes the checksum of every file of the data set. Its presence says that the data set is complete."""
    files = dict(tars)
    for name in (manifest.NAME, "index.arrow", SIZES, SETTINGS, QUARANTINE, "captions.jsonl"):
        if (out / name).exists():
            files[name] = {"bytes": os.path.getsize(out / name), "sha256": file_sha256(out / name)}
    write_json(out / CHECKSUMS, {"version": 1, "files": files})
