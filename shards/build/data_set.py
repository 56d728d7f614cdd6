"""Makes a data set: a plan, then shard after shard, then what describes them all."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from d2s.common.files import atomic_file, file_sha256, read_json, write_json
from d2s.common.process_map import map_ordered
from d2s.common.progress import Progress, track
from d2s.shards.build.dense import DenseOptions
from d2s.shards.build.layout import Layout, Shard
from d2s.shards.build.plan import Plan, digest, make_plan
from d2s.shards.build.writer import SCRATCH, Work, is_done, part_path, start, write_shard
from d2s.shards.format import manifest
from d2s.shards.format.index_file import NAME as INDEX
from d2s.shards.format.index_file import IndexWriter
from d2s.shards.format.sample import Entry, Faults

CHECKSUMS = "checksums.json"
SIZES = "sizes.json"
SETTINGS = "build.json"
QUARANTINE = "quarantine.jsonl"
SIDECAR = "captions.jsonl"
# In build.json: the sha256 over the caption files and split lists; older data sets have none.
INPUT = "input_sha256"
_DESCRIPTION = (manifest.NAME, INDEX, SIZES, SETTINGS, QUARANTINE, SIDECAR)


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """What decides the bytes of a data set, besides its input."""

    resize: int | None = None
    """shrink the shorter side of larger images to so many pixels"""
    quality: int = 95
    """JPEG quality of images that are re-encoded, 1 to 100"""
    layout: Layout = field(default_factory=Layout)
    """how the images are ordered and cut into shards"""
    quarantine: bool = False
    """list and leave out bad input instead of stopping at it"""
    decode: bool = True
    """for tars indexed in place: False reads only the headers of the images"""

    def __post_init__(self) -> None:
        if self.resize is not None and self.resize < 16:
            raise ValueError(f"resize={self.resize} is too small; 16 pixels at least")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality={self.quality} is out of range; 1 to 100, 95 by default")


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """What a build has made: samples a split, shards, bytes of the tars, and what was left out."""

    samples: dict[str, int]
    shards: int
    bytes: int
    quarantined: int
    extra: int


def open_output(out: Path, resume: bool) -> None:
    """Makes the folder of a build ready. Raises ValueError if something in it must not be touched."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file, not a folder")
    held = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if held and not resume:
        resumable = SCRATCH in held
        remedy = (
            "--resume continues the build that was interrupted there"
            if resumable
            else "choose another folder"
        )
        raise ValueError(f"--out {out}: not empty (holds {held[0]}); {remedy}")
    if held and SCRATCH not in held:
        raise ValueError(f"--out {out}: holds {held[0]}, but no interrupted build to resume")


def open_in_place(folder: Path, force: bool) -> None:
    """Refuses to describe tars a second time unless forced; then drops the old description."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    held = [name for name in (CHECKSUMS, *_DESCRIPTION) if (folder / name).exists()]
    if CHECKSUMS in held and not force:
        raise ValueError(f"{folder}: is indexed already; --force does it anew")
    # The marker goes first: a half-removed description never looks complete.
    for name in held:
        (folder / name).unlink()
    if force:
        shutil.rmtree(folder / SCRATCH, ignore_errors=True)


def build(
    entries: Iterable[Entry],
    out: Path,
    config: BuildConfig,
    *,
    dense: DenseOptions | None = None,
    facts: dict | None = None,
    faults: Faults | None = None,
    workers: int = 1,
    part: tuple[int, int] | None = None,
) -> BuildReport | None:
    """Builds a data set from a source's entries; goes on with one that was interrupted in the same folder.

    Args:
        entries: the source, whose own faults go to `faults`.
        out: the folder; `open_output` or `open_in_place` has seen to it.
        facts: what build.json is to say about the input, beside the settings.
        workers: processes; the output does not depend on it.
        part: (i, n) makes the i-th of n parts of the shards, from 1, beside other processes or machines that make
            the others; the last part to end joins them all. Returns None for a part that did not.

    Raises:
        ValueError: bad input (one line), another build at work there, or other input than before the
            interruption.
    """
    faults = faults or Faults(config.quarantine)
    scratch = out / SCRATCH
    # Parts plan each for itself: they may be on different machines, and start at any time.
    planned = scratch / f"plan-{part[0]}-of-{part[1]}" if part else scratch
    planned.mkdir(parents=True, exist_ok=True)
    with open(scratch / "lock", "w") as lock, open(planned / "own-lock", "w") as own:
        _lock(own, out)
        # Parts share the folder; a build of the whole has it to itself.
        _lock(lock, out, shared=part is not None)
        settings = settings_of(config, facts)
        try:
            plan = make_plan(planned, entries, dense=dense, layout=config.layout, faults=faults)
            _same_build(scratch, planned, settings)
        except ValueError:
            _leave_no_trace(out, planned)
            raise
        _make_shards(plan, planned, out, config, workers, part or (1, 1))
        if part and not _last(lock, plan, out):
            return None
        report = _finish(plan, out, config, settings, faults)
        shutil.rmtree(scratch)
    return report


def _lock(file: IO[str], out: Path, shared: bool = False) -> None:
    """Locks a file until it is closed. Raises ValueError where another process holds it."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"--out {out}: another build is writing there now") from None
    except OSError as error:
        # Some cluster file systems have no locks; there it is up to the user.
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise


def _last(lock: IO[str], plan: Plan, out: Path) -> bool:
    """Whether all shards are done and no other part is at work: then this one joins them.

    The lock is let go before it is asked for: of two parts that end together one finds the folder free.
    """
    fcntl.flock(lock, fcntl.LOCK_UN)
    try:
        _lock(lock, out)
    except ValueError:
        return False
    return not (out / CHECKSUMS).exists() and all(is_done(out, shard) for shard in plan.shards)


def settings_of(config: BuildConfig, facts: dict | None = None) -> dict:
    """What build.json says: all that decides the bytes, nothing about the machine or the moment."""
    layout = config.layout
    size = layout.shard_size
    settings = {
        "version": 1,
        "resize": config.resize,
        "quality": config.quality,
        "shard_size": size.samples if size.bytes is None else f"{size.bytes} bytes",
        "seed": layout.seed,
        "holdout": layout.holdout,
        "in_place": layout.in_place is not None,
        "decoded": config.decode,
        "on_error": "quarantine" if config.quarantine else "stop",
        **(facts or {}),
    }
    # As JSON gives it back, so that it can be compared with what a file holds.
    return json.loads(json.dumps(settings))


def is_complete(out: Path, settings: dict) -> bool:
    """True if just this build is complete there already. Raises ValueError if another one is."""
    if not (out / CHECKSUMS).exists():
        return False
    held = read_json(out / SETTINGS) if (out / SETTINGS).exists() else None
    if not isinstance(held, dict) or {**held, INPUT: None} != {**settings, INPUT: None}:
        raise ValueError(f"--out {out}: a data set of other settings lies there; choose another folder")
    if INPUT in held and held[INPUT] != settings.get(INPUT):
        raise ValueError(
            f"--out {out}: a data set of other captions or splits lies there; choose another folder"
        )
    shutil.rmtree(out / SCRATCH, ignore_errors=True)
    return True


def _same_build(scratch: Path, planned: Path, settings: dict) -> None:
    """Remembers what is being built; a resumed build has to be the same one."""
    path = scratch / "settings.json"
    # Shards that are done had no fault, so it does not matter what was to become of faults. The plan says more
    # of the input than the checksum of its files does.
    deciding = {name: value for name, value in settings.items() if name not in ("on_error", INPUT)}
    now = {"settings": deciding, "plan": digest(planned)}
    if path.exists() and read_json(path) != now:
        out = scratch.parent
        remedy = "run with --force" if settings["in_place"] else "delete it, or build elsewhere"
        raise ValueError(f"{out}: input or options changed since the interrupted build; {remedy}")
    # From a name of its own: another part may be writing the same.
    own = planned / "own-settings.json"
    write_json(own, now)
    own.replace(path)


def _leave_no_trace(out: Path, planned: Path) -> None:
    """A build refused before its first shard leaves no folder behind that would be in the way of the next."""
    others = [path for path in (out / SCRATCH).glob("plan-*") if path != planned]
    if not (out / SCRATCH / "settings.json").exists() and not others:
        shutil.rmtree(out / SCRATCH)
        if not any(out.iterdir()):
            out.rmdir()


def _make_shards(
    plan: Plan, planned: Path, out: Path, config: BuildConfig, workers: int, part: tuple[int, int]
) -> None:
    work = Work(
        out=out,
        plan=planned,
        resize=config.resize,
        quality=config.quality,
        quarantine=config.quarantine,
        in_place=config.layout.in_place is not None,
        decode=config.decode,
    )
    number, parts = part
    todo = [shard for shard in plan.shards[number - 1 :: parts] if not is_done(out, shard)]
    total = sum(shard.stop - shard.start for shard in todo)
    results = map_ordered(write_shard, todo, workers, start, (work,))
    counted = ((shard.stop - shard.start, shard) for shard, _ in results)
    for _ in track(counted, Progress("shards", total)):
        pass


def _finish(plan: Plan, out: Path, config: BuildConfig, settings: dict, faults: Faults) -> BuildReport:
    """Joins the shards' rows into the files that describe the whole; checksums.json last, as the marker."""
    markers = {shard.name: read_json(part_path(out, shard).with_suffix(".json")) for shard in plan.shards}
    samples = dict.fromkeys(plan.counts, 0)
    for shard in plan.shards:
        samples[shard.split] += markers[shard.name]["samples"]
        faults.rows.extend(markers[shard.name]["faults"])
    for split, count in samples.items():
        if not count:
            raise ValueError(f"split {split!r} is empty: every one of its images was left out")
    full = [shard for shard in plan.shards if markers[shard.name]["samples"]]
    _describe(out, full, sum(samples.values()), in_place=config.layout.in_place is not None)
    write_json(out / SIZES, {shard.name: markers[shard.name]["samples"] for shard in full})
    write_json(out / SETTINGS, settings)
    if faults.rows:
        with atomic_file(out / QUARANTINE) as file:
            for row in faults.rows:
                file.write(json.dumps(row, sort_keys=True).encode() + b"\n")
    _write_checksums(out, {shard.name: markers[shard.name] for shard in full})
    return BuildReport(
        samples=samples,
        shards=len(full),
        bytes=sum(markers[shard.name]["bytes"] for shard in full),
        quarantined=len(faults.rows),
        extra=plan.extra,
    )


def _describe(out: Path, shards: list[Shard], rows: int, in_place: bool) -> None:
    """Writes manifest.parquet and index.arrow, and captions.jsonl for tars in place; a shard in memory at a time."""
    index = IndexWriter(rows, out / SCRATCH)
    with atomic_file(out / manifest.NAME) as file, manifest.open_writer(file) as writer:
        base = 0
        for shard in shards:
            table = pq.read_table(part_path(out, shard))
            crc32 = table.column("crc32").to_numpy()
            table = table.drop_columns(["crc32"])
            if in_place:
                place = table.schema.get_field_index("json_offset")
                moved = pa.array(table.column("json_offset").to_numpy() + base)
                table = table.set_column(place, "json_offset", moved)
                base += part_path(out, shard).with_suffix(".jsonl").stat().st_size
            writer.write_table(table, row_group_size=table.num_rows)
            index.add(table, crc32)
    if in_place:
        with atomic_file(out / SIDECAR) as file:
            for shard in shards:
                with open(part_path(out, shard).with_suffix(".jsonl"), "rb") as part:
                    shutil.copyfileobj(part, file, 1 << 20)
    index.finish(out, "sidecar" if in_place else "tar")


def _write_checksums(out: Path, tars: dict[str, dict]) -> None:
    """Writes the checksum of every file of the data set. Its presence says that the data set is complete."""
    files = {name: {"bytes": marker["bytes"], "sha256": marker["sha256"]} for name, marker in tars.items()}
    for name in _DESCRIPTION:
        if (out / name).exists():
            files[name] = {"bytes": os.path.getsize(out / name), "sha256": file_sha256(out / name)}
    write_json(out / CHECKSUMS, {"version": 1, "files": files})
