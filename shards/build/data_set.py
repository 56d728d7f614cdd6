"""Builds a data set. Assigns the images to shards, writes the shards, and writes files that describe them."""

import fcntl
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from d2s.common.files import read_json
from d2s.common.process_map import map_ordered
from d2s.common.progress import track
from d2s.shards.build.assignment import Assignment, assign, digest
from d2s.shards.build.caption_join import JoinOptions
from d2s.shards.build.description import write_description, write_quarantine
from d2s.shards.build.output_folder import lock, remove_empty_build
from d2s.shards.build.settings import BuildConfig, check_same_build, settings_of
from d2s.shards.build.shard_writer import is_done, part_path, start_worker, write_shard
from d2s.shards.format.file_names import CHECKSUMS, QUARANTINE, SCRATCH
from d2s.shards.sources.entry import Entry
from d2s.shards.sources.faults import Faults


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """The counts that a finished build reports."""

    samples: dict[str, int]
    """Maps each split to its number of samples."""
    shards: int
    bytes: int
    """Size of all tars together."""
    quarantined: int
    """Number of faults that quarantine.jsonl lists."""
    extra: int
    """Number of rows in the separate caption files that match no image."""


def build(
    entries: Iterable[Entry],
    out: Path,
    config: BuildConfig,
    *,
    join: JoinOptions | None = None,
    facts: dict | None = None,
    faults: Faults | None = None,
    workers: int = 1,
    part: tuple[int, int] | None = None,
) -> BuildReport | None:
    """Builds a data set from the entries of a source, or continues an interrupted build in `out`.

    Args:
        entries: the entries of the source. While they are read, the source adds its own faults to `faults`.
        out: the output folder, already checked by `check_output` or `remove_description`.
        join: says how captions from separate files are joined to the images. None if there are no such files.
        facts: entries for build.json that describe the input. They are added to the settings.
        workers: number of processes. The output does not depend on this number.
        part: (i, n) builds only the i-th of n parts of the shards, counted from 1. Other processes or machines
            build the other parts. The part that finishes last completes the data set. The others return None.

    Raises:
        ValueError: the input is bad (in one line), another build is writing to `out`, or the interrupted build had
            other input or settings.
    """
    faults = faults or Faults(config.quarantine)
    scratch = out / SCRATCH
    # Each part makes its own assignment, because parts run on different machines and start at any time.
    own = scratch / f"assignment-{part[0]}-of-{part[1]}" if part else scratch
    own.mkdir(parents=True, exist_ok=True)
    with open(scratch / "lock", "w") as common_lock, open(own / "own-lock", "w") as own_lock:
        lock(own_lock, out)
        # Parts of one build share the lock of the output folder. A build without parts locks it exclusively.
        lock(common_lock, out, shared=part is not None)
        settings = settings_of(config, facts)
        with _kept_faults(out, faults):
            try:
                assignment = assign(own, entries, join=join, layout=config.layout, faults=faults)
                check_same_build(scratch, own, settings, digest(own))
            except ValueError:
                remove_empty_build(out, own)
                raise
            _write_shards(assignment, own, out, config, workers, part or (1, 1))
            if part and not _is_last(common_lock, assignment, out):
                return None
            report = _finish(assignment, out, settings, faults)
        shutil.rmtree(scratch)
    return report


@contextmanager
def _kept_faults(out: Path, faults: Faults) -> Iterator[None]:
    """If the build ends with ValueError, writes the faults found so far to quarantine.jsonl and adds a summary."""
    try:
        yield
    except ValueError as error:
        if not faults.rows:
            raise
        write_quarantine(out, faults.rows)
        raise ValueError(f"{error}; {faults.summary()}; all: {out / QUARANTINE}") from None


def _is_last(common_lock: IO[str], assignment: Assignment, out: Path) -> bool:
    """Returns whether all shards are done and no other part is running. If so, this part completes the build.

    Each part releases its shared lock before it requests the exclusive lock. So one part always gets the lock.
    """
    fcntl.flock(common_lock, fcntl.LOCK_UN)
    try:
        lock(common_lock, out)
    except ValueError:
        return False
    return not (out / CHECKSUMS).exists() and all(is_done(out, shard) for shard in assignment.shards)


def _write_shards(
    assignment: Assignment, own: Path, out: Path, config: BuildConfig, workers: int, part: tuple[int, int]
) -> None:
    number, parts = part
    todo = [shard for shard in assignment.shards[number - 1 :: parts] if not is_done(out, shard)]
    results = map_ordered(write_shard, todo, workers, start_worker, (out, own, config))
    written = ((shard.stop - shard.start, None) for shard, _ in results)
    for _ in track(written, "shards", sum(shard.stop - shard.start for shard in todo)):
        pass


def _finish(assignment: Assignment, out: Path, settings: dict, faults: Faults) -> BuildReport:
    markers = {s.name: read_json(part_path(out, s).with_suffix(".json")) for s in assignment.shards}
    samples = dict.fromkeys(assignment.counts, 0)
    for shard in assignment.shards:
        samples[shard.split] += markers[shard.name]["samples"]
        faults.rows.extend(markers[shard.name]["faults"])
    for split, count in samples.items():
        if not count:
            raise ValueError(f"split {split!r} is empty: every one of its images was left out")
    shards = [shard for shard in assignment.shards if markers[shard.name]["samples"]]
    write_description(out, shards, markers, faults.rows, settings)
    return BuildReport(
        samples=samples,
        shards=len(shards),
        bytes=sum(markers[shard.name]["bytes"] for shard in shards),
        quarantined=len(faults.rows),
        extra=assignment.extra,
    )
