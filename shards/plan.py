"""The plan of a build: every image of the source, checked, joined with its captions, ordered, cut into shards.

All that can be found out without decoding images is found out here, before a shard is written. The plan lies on
disk and is memory-mapped by the workers; making it needs about 60 bytes an image.
"""

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, field, replace
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from d2s.shards import dense as dense_join
from d2s.shards.dense import DenseOptions
from d2s.shards.files import file_sha256
from d2s.shards.pictures import check, looks_whole
from d2s.shards.sample import Entry, Faults, caption_fault, clean_key, hash64, split_rank
from d2s.shards.spool import Spool, SpoolWriter

_STRINGS = ("split", "source_id", "where", "key", "path", "sha256", "filename", "join")
_SCHEMA = pa.schema(
    [(name, pa.string()) for name in _STRINGS]
    + [(name, pa.int64()) for name in ("image_id", "offset", "size", "number", "seed")]
    + [(name, pa.list_(pa.string())) for name in ("sparse", "dense")]
)
_CHECKED_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True)
class ShardSize:
    """How a split is cut: so many samples a shard, or shards of about so many bytes of source images."""

    samples: int | None = 1000
    bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the images are arranged: which go where, in what order, cut how."""

    shard_size: ShardSize = field(default_factory=ShardSize)
    seed: int = 0
    """of the order within each split"""
    holdout: dict[str, int] = field(default_factory=dict)
    """images taken from train, by the same shuffle, for splits that the source does not have"""
    in_place: Path | None = None
    """the folder of tars that stay as they are: a shard is a tar, the order is theirs"""


@dataclass(frozen=True, slots=True)
class Shard:
    """A tar to write: positions start..stop of the plan's order."""

    name: str
    split: str
    start: int
    stop: int


class Plan:
    """A plan on disk, opened for reading by whichever process writes shards."""

    def __init__(self, folder: Path) -> None:
        self._entries = Spool(folder / "entries.arrow")
        self._order = np.load(folder / "order.npy", mmap_mode="r")
        self._matched = np.load(folder / "matched.npy", mmap_mode="r")
        self._dense = Spool(folder / "dense.arrow") if (folder / "dense.arrow").exists() else None
        facts = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        self._renamed = {int(row): key for row, key in facts["renamed"].items()}
        self.shards = [Shard(*shard) for shard in facts["shards"]]
        self.counts: dict[str, int] = facts["counts"]
        self.extra: int = facts["extra"]

    def entries(self, shard: Shard) -> Iterator[Entry]:
        """The entries of a shard in their final order, with final key and captions."""
        for row in self._order[shard.start : shard.stop]:
            yield self._entry(int(row), shard.split)

    def _entry(self, number: int, split: str) -> Entry:
        row = self._entries.row(number)
        join = row.pop("join")
        row["split"] = split
        row["key"] = self._renamed.get(number, row["key"])
        row["sparse"], row["dense"] = tuple(row["sparse"]), tuple(row["dense"])
        entry = Entry(**row)
        if self._dense is None or self._matched[number] < 0:
            return entry
        found = self._dense.row(int(self._matched[number]))
        assert found["key"] == join, f"two join keys with one hash: {found['key']!r} and {join!r}"
        return replace(
            entry,
            sparse=tuple(found["sparse"]) or entry.sparse,
            dense=entry.dense + tuple(found["dense"]),
        )


@dataclass
class _Listing:
    """What is kept in memory of every entry while planning: numbers only."""

    names: array  # hash of source_id: it must be unique
    keys: array  # hash of the derived key: made unique if it is not
    order: array  # the keyed hash that shuffles
    joins: array  # hash of what captions are joined by
    ids: array
    sizes: array
    splits: array
    captions: array
    alive: array
    tars: array  # number of the tar that an image lies in, -1 for a file of its own
    split_names: list[str] = field(default_factory=list)
    tar_names: list[str] = field(default_factory=list)


def _join_value(entry: Entry, key: str, dense: DenseOptions | None, image_id: int) -> str:
    if dense is None:
        return ""
    if dense.key == "sha256":
        if not entry.sha256 and entry.path:
            return hashlib.sha256(read_bytes(entry)).hexdigest()
        return entry.sha256.lower()
    return {
        "filename": entry.filename or entry.source_id,
        "key": entry.key or key,
        "image_id": str(image_id),
    }[dense.key]


def read_bytes(entry: Entry) -> bytes:
    """The encoded image of an entry. Raises OSError if the file cannot be read."""
    with open(entry.path, "rb") as file:
        if entry.offset < 0:
            return file.read()
        file.seek(entry.offset)
        return file.read(entry.size)


def _list(
    entries: Iterable[Entry], spool: Path, dense: DenseOptions | None, seed: int, faults: Faults
) -> _Listing:
    found = _Listing(*(array(kind) for kind in "QQQQqqhqbi"))
    secret = str(seed).encode()
    places: dict[str, int] = {}
    tars: dict[str, int] = {}
    entries = iter(entries)
    with SpoolWriter(spool, _SCHEMA) as writer, ThreadPoolExecutor(8) as pool:
        while batch := list(islice(entries, _CHECKED_AT_ONCE)):
            for entry, (size, reason) in zip(batch, pool.map(_file_fault, batch), strict=True):
                reason = reason or caption_fault(entry.sparse + entry.dense) or _split_fault(entry.split)
                if reason:
                    faults.add(entry.where, reason, entry.source_id)
                number = writer.length
                image_id = number if entry.image_id is None else entry.image_id
                key = clean_key(entry.key or entry.source_id)
                join = _join_value(entry, key, dense, image_id) if not reason else ""
                found.names.append(hash64(entry.source_id))
                found.keys.append(hash64(key))
                found.order.append(hash64(entry.source_id, secret))
                found.joins.append(hash64(join))
                found.ids.append(image_id)
                found.sizes.append(size)
                found.splits.append(places.setdefault(entry.split, len(places)))
                found.captions.append(-1 if entry.number >= 0 else len(entry.sparse) + len(entry.dense))
                found.alive.append(not reason)
                found.tars.append(tars.setdefault(entry.path, len(tars)) if entry.offset >= 0 else -1)
                writer.append(_row(entry, key, image_id, join, bool(reason)))
    found.split_names, found.tar_names = list(places), list(tars)
    return found


def _row(entry: Entry, key: str, image_id: int, join: str, bad: bool) -> dict:
    # The captions of a bad entry may be anything, and nobody will ask for them.
    return {
        "split": entry.split,
        "source_id": entry.source_id,
        "where": entry.where,
        "key": key,
        "path": entry.path,
        "sha256": entry.sha256,
        "filename": entry.filename,
        "join": join,
        "image_id": image_id,
        "offset": entry.offset,
        "size": entry.size,
        "number": entry.number,
        "seed": entry.seed,
        "sparse": [] if bad else [caption.strip() for caption in entry.sparse],
        "dense": [] if bad else [caption.strip() for caption in entry.dense],
    }


def _split_fault(split: str) -> str | None:
    if isinstance(split, str) and split and split.replace("-", "").replace("_", "").isalnum():
        return None
    return f"split {split!r} is not a name of letters, digits, - and _"


def _file_fault(entry: Entry) -> tuple[int, str | None]:
    """Size of the image file, and why it cannot be used if that shows without decoding each of them."""
    if not entry.path:
        return -1, None
    try:
        with open(entry.path, "rb") as file:
            start = max(entry.offset, 0)
            size = file.seek(0, 2) if entry.offset < 0 else entry.size
            file.seek(start)
            head = file.read(min(12, size))
            file.seek(start + max(0, size - 12))
            tail = file.read(min(12, size))
    except FileNotFoundError:
        return -1, f"image {entry.path} does not exist"
    except OSError as error:
        return -1, f"image {entry.path}: {error.strerror}"
    if looks_whole(head, tail, size):
        return size, None
    try:
        check(read_bytes(entry))
    except ValueError as error:
        return size, f"image {entry.path}: {error}"
    return size, None


def _repeated(hashes: np.ndarray) -> Iterator[np.ndarray]:
    """Groups of rows whose hashes are equal, each group in row order."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    ends = (
        np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True)) + 1 if len(order) else np.empty(0, int)
    )
    starts = np.append(0, ends[:-1]) if len(ends) else ends
    for start, stop in zip(starts[ends - starts > 1], ends[ends - starts > 1], strict=True):
        yield order[start:stop]


def _refuse_duplicates(found: _Listing, spool: Spool, alive: np.ndarray, faults: Faults) -> None:
    groups = [("source_id", "image", found.names, "Q"), ("image_id", "image id", found.ids, "q")]
    for column, label, values, kind in groups:
        for rows in _repeated(np.frombuffer(values, kind)):
            first = spool.row(int(rows[0]))
            for number in rows[1:]:
                row = spool.row(int(number))
                if alive[number] and row[column] == first[column]:
                    reason = f"{label} {row[column]!r} stands here a second time (first: {first['where']})"
                    faults.add(row["where"], reason, row["source_id"])
                    alive[number] = False


def _rename(found: _Listing, spool: Spool) -> dict[int, str]:
    """Keys that several images would share get a hash of the file's full name behind them."""
    renamed = {}
    for rows in _repeated(np.frombuffer(found.keys, "Q")):
        for number in rows:
            row = spool.row(int(number))
            renamed[int(number)] = f"{row['key']}-{hash64(row['source_id']):016x}"
    return renamed


def _cut(split: str, rows: np.ndarray, sizes: np.ndarray, limit: ShardSize, start: int) -> list[Shard]:
    if limit.bytes is None:
        cuts = list(range(0, len(rows), limit.samples))
    else:
        if (sizes[rows] < 0).any():
            raise ValueError(
                "shard-size in bytes: this source's images have no size yet; give a number of samples"
            )
        filled, cuts = limit.bytes, []
        for position, size in enumerate(sizes[rows].tolist()):
            if filled + size > limit.bytes:
                cuts.append(position)
                filled = 0
            filled += size
    ends = [*cuts[1:], len(rows)]
    pairs = enumerate(zip(cuts, ends, strict=True))
    return [Shard(f"{split}/{number:05d}.tar", split, start + a, start + b) for number, (a, b) in pairs]


def make_plan(
    folder: Path,
    entries: Iterable[Entry],
    *,
    dense: DenseOptions | None,
    layout: Layout,
    faults: Faults,
) -> Plan:
    """Lists, checks, joins, orders and cuts. Raises ValueError, one line, for what a user has to mend."""
    folder.mkdir(parents=True, exist_ok=True)
    found = _list(entries, folder / "entries.arrow", dense, layout.seed, faults)
    if not len(found.names):
        raise ValueError("the source has no images; nothing to build")
    spool = Spool(folder / "entries.arrow")
    alive = np.frombuffer(found.alive, np.int8).astype(bool)
    _refuse_duplicates(found, spool, alive, faults)
    matched, extra = np.full(len(alive), -1, np.int64), 0
    (folder / "dense.arrow").unlink(missing_ok=True)
    if dense is not None:
        hashes = np.frombuffer(found.joins, np.uint64)
        matched, extra = dense_join.join(
            dense,
            hashes,
            alive,
            folder / "dense.arrow",
            faults,
            lambda number: spool.row(int(number))["join"],
        )
    captions = np.frombuffer(found.captions, np.int64)
    for number in np.flatnonzero(alive & (captions == 0) & (matched < 0)):
        row = spool.row(int(number))
        faults.add(row["where"], f"image {row['source_id']!r} has no caption", row["source_id"])
        alive[number] = False
    shards, counts, order = _arrange(found, alive, layout)
    np.save(folder / "order.npy", order)
    np.save(folder / "matched.npy", matched)
    facts = {
        "renamed": _rename(found, spool),
        "shards": [astuple(shard) for shard in shards],
        "counts": counts,
        "extra": extra,
    }
    (folder / "plan.json").write_text(json.dumps(facts), encoding="utf-8")
    return Plan(folder)


def _arrange(
    found: _Listing, alive: np.ndarray, layout: Layout
) -> tuple[list[Shard], dict[str, int], np.ndarray]:
    """Orders each split by the keyed hash and cuts it into shards; or takes order and shards of the tars."""
    splits, shuffle = np.frombuffer(found.splits, np.int16), np.frombuffer(found.order, np.uint64)
    sizes = np.frombuffer(found.sizes, np.int64)
    groups = {name: np.flatnonzero(alive & (splits == code)) for code, name in enumerate(found.split_names)}
    if not layout.in_place:
        groups = {name: rows[np.argsort(shuffle[rows], kind="stable")] for name, rows in groups.items()}
    _hold_out(groups, layout.holdout)
    shards: list[Shard] = []
    counts: dict[str, int] = {}
    parts: list[np.ndarray] = []
    start = 0
    for split in sorted(groups, key=split_rank):
        rows = groups[split]
        if not len(rows):
            raise ValueError(f"split {split!r} is empty: every one of its images was left out")
        if layout.in_place:
            shards += _tars(split, rows, found, layout.in_place, start)
        else:
            shards += _cut(split, rows, sizes, layout.shard_size, start)
        counts[split] = len(rows)
        parts.append(rows)
        start += len(rows)
    return shards, counts, np.concatenate(parts)


def _hold_out(groups: dict[str, np.ndarray], holdout: dict[str, int]) -> None:
    for split, count in holdout.items():
        train = groups.get("train", np.empty(0, np.int64))
        if split in groups:
            raise ValueError(
                f"holdout: the source has a split {split!r} of its own; name another or leave it out"
            )
        if count >= len(train):
            raise ValueError(f"holdout: {split}={count} leaves nothing of the {len(train)} images in train")
        groups[split], groups["train"] = train[:count], train[count:]


def _tars(split: str, rows: np.ndarray, found: _Listing, root: Path, start: int) -> list[Shard]:
    numbers = np.frombuffer(found.tars, np.int32)[rows]
    cuts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(rows)]
    names = [Path(found.tar_names[numbers[cut]]).relative_to(root).as_posix() for cut in cuts[:-1]]
    return [
        Shard(name, split, start + a, start + b) for name, (a, b) in zip(names, pairwise(cuts), strict=True)
    ]


def digest(folder: Path) -> str:
    """A checksum of the whole plan: an interrupted build goes on only if its plan comes out the same."""
    names = ("entries.arrow", "dense.arrow", "order.npy", "matched.npy", "plan.json")
    sums = [file_sha256(folder / name) for name in names if (folder / name).exists()]
    return hashlib.sha256(" ".join(sums).encode()).hexdigest()
