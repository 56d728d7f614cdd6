"""Lists the images of a source and checks whatever shows without decoding each of them."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from d2s.shards.build.dense import DenseOptions
from d2s.shards.build.spool import Spool, SpoolWriter
from d2s.shards.format.pictures import check, looks_whole
from d2s.shards.format.sample import Entry, Faults, caption_fault, clean_key, hash64

_STRINGS = ("split", "source_id", "where", "key", "path", "sha256", "filename", "join", "given")
_SCHEMA = pa.schema(
    [(name, pa.string()) for name in _STRINGS]
    + [(name, pa.int64()) for name in ("image_id", "offset", "size", "number", "seed")]
    + [(name, pa.list_(pa.string())) for name in ("sparse", "dense")]
)
_CHECKED_AT_ONCE = 4096


@dataclass
class Listing:
    """What is kept in memory of every entry while planning: numbers only."""

    names: array  # hash of source_id: it must be unique
    keys: array  # hash of the derived key: made unique if it is not
    order: array  # the keyed hash that shuffles
    joins: array  # hash of what captions are joined by
    given: array  # hash of the key that the source gave and has to keep unique, or of ""
    ids: array
    sizes: array
    splits: array
    captions: array
    alive: array
    tars: array  # number of the tar that an image lies in, -1 for a file of its own
    split_names: list[str] = field(default_factory=list)
    tar_names: list[str] = field(default_factory=list)

    def groups(self, alive: np.ndarray) -> dict[str, np.ndarray]:
        """The numbers of the images of each split that are not left out."""
        codes = np.frombuffer(self.splits, np.int16)
        named = ((code, name) for code, name in enumerate(self.split_names) if not _split_fault(name))
        return {name: np.flatnonzero(alive & (codes == code)) for code, name in named}


def _join_value(entry: Entry, key: str, dense: DenseOptions | None, image_id: int, readable: bool) -> str:
    """What the row of captions has to hold. Bad images have it too: their row is known, though of no use."""
    if dense is None:
        return ""
    if dense.key == "sha256":
        if not entry.sha256 and entry.path and readable:
            return hashlib.sha256(read_bytes(entry)).hexdigest()
        return entry.sha256.lower()
    if dense.key == "image_id":
        return str(image_id)
    return entry.key or key if dense.key == "key" else entry.filename or entry.source_id


def read_bytes(entry: Entry) -> bytes:
    """The encoded image of an entry. Raises OSError if the file cannot be read."""
    with open(entry.path, "rb") as file:
        if entry.offset < 0:
            return file.read()
        file.seek(entry.offset)
        return file.read(entry.size)


def list_images(
    entries: Iterable[Entry], spool: Path, dense: DenseOptions | None, seed: int, faults: Faults
) -> Listing:
    found = Listing(*(array(kind) for kind in "QQQQQqqhqbi"))
    secret = str(seed).encode()
    places: dict[str, int] = {}
    tars: dict[str, int] = {}
    entries = iter(entries)
    with SpoolWriter(spool, _SCHEMA) as writer, ThreadPoolExecutor(8) as pool:
        while batch := list(islice(entries, _CHECKED_AT_ONCE)):
            for entry, (size, reason) in zip(batch, pool.map(_file_fault, batch), strict=True):
                readable = reason is None
                reason = reason or caption_fault(entry.sparse + entry.dense)
                reason = (
                    reason or _split_fault(entry.split) or _id_fault(entry.image_id) or _name_fault(entry)
                )
                if reason:
                    faults.add(entry.where, reason, entry.source_id)
                number = writer.length
                image_id = number if entry.image_id is None or _id_fault(entry.image_id) else entry.image_id
                key = clean_key(entry.key or entry.source_id)
                join = _join_value(entry, key, dense, image_id, readable)
                # Keys of tars repeat from tar to tar and are made unique; whoever writes a table means one image.
                given = entry.key if entry.key and entry.offset < 0 else ""
                found.names.append(hash64(entry.source_id))
                found.keys.append(hash64(key))
                found.order.append(hash64(entry.source_id, secret))
                found.joins.append(hash64(join))
                found.given.append(hash64(given))
                found.ids.append(image_id)
                found.sizes.append(size)
                found.splits.append(places.setdefault(entry.split, len(places)))
                found.captions.append(-1 if entry.number >= 0 else len(entry.sparse) + len(entry.dense))
                found.alive.append(not reason)
                found.tars.append(tars.setdefault(entry.path, len(tars)) if entry.offset >= 0 else -1)
                writer.append(_row(entry, key, image_id, join, given, bool(reason)))
    found.split_names, found.tar_names = list(places), list(tars)
    return found


def _row(entry: Entry, key: str, image_id: int, join: str, given: str, bad: bool) -> dict:
    # The captions of a bad entry may be anything, and nobody will ask for them.
    row = {
        "split": entry.split,
        "source_id": entry.source_id,
        "where": entry.where,
        "key": key,
        "path": entry.path,
        "sha256": entry.sha256,
        "filename": entry.filename,
        "join": join,
        "given": given,
        "image_id": image_id,
        "offset": entry.offset,
        "size": entry.size,
        "number": entry.number,
        "seed": entry.seed,
        "sparse": [] if bad else [caption.strip() for caption in entry.sparse],
        "dense": [] if bad else [caption.strip() for caption in entry.dense],
    }
    if bad:
        row |= {name: row[name].encode("utf-8", "replace").decode() for name in _STRINGS}
    return row


def _split_fault(split: str) -> str | None:
    if split.isascii() and split.replace("-", "").replace("_", "").isalnum():
        return None
    return f"split {split!r} is not a name of letters, digits, - and _"


def _id_fault(image_id: object) -> str | None:
    whole = isinstance(image_id, int) and not isinstance(image_id, bool)
    if image_id is None or (whole and abs(image_id) < 2**63):
        return None
    return f"image id {image_id!r} is not a whole number of 64 bits"


def _name_fault(entry: Entry) -> str | None:
    """Names in a tar are bytes, and those in JSON may be half a surrogate pair: no such name can be stored."""
    for name in (entry.source_id, entry.key or "", entry.path, entry.filename, entry.sha256):
        if name and not name.isascii() and caption_fault((name,)):
            return f"name {name!r} is not valid Unicode"
    return None


def _file_fault(entry: Entry) -> tuple[int, str | None]:
    """Size of the image file, and why it cannot be used if that shows without decoding each of them."""
    if not entry.path:
        return -1, None
    if "\0" in entry.path:
        return -1, f"image {entry.path!r}: no file name holds a zero byte"
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


def refuse_duplicates(found: Listing, spool: Spool, alive: np.ndarray, faults: Faults) -> None:
    """Leaves out images that the source lists twice, or whose image id or given key another image has already."""
    groups = [("source_id", "image", found.names, "Q"), ("image_id", "image id", found.ids, "q")]
    groups.append(("given", "key", found.given, "Q"))
    for column, label, values, kind in groups:
        for rows in _repeated(np.frombuffer(values, kind)):
            first = spool.row(int(rows[0]))
            if first[column] == "":
                continue
            for number in rows[1:]:
                row = spool.row(int(number))
                if alive[number] and row[column] == first[column]:
                    reason = f"{label} {row[column]!r} stands here a second time (first: {first['where']})"
                    faults.add(row["where"], reason, row["source_id"])
                    alive[number] = False


def refuse_shared_joins(
    found: Listing, spool: Spool, alive: np.ndarray, dense: DenseOptions, faults: Faults
) -> None:
    """Leaves out images that captions kept apart could not tell from each other."""
    if dense.key == "sha256":
        # Equal checksums are equal images: what describes the one describes the other.
        return
    for rows in _repeated(np.frombuffer(found.joins, "Q")):
        members = [spool.row(int(number)) for number in rows]
        for number, row in zip(rows, members, strict=True):
            others = (other for other in members if other["source_id"] != row["source_id"])
            other = next((other for other in others if other["join"] == row["join"]), None)
            if alive[number] and other is not None:
                reason = (
                    f"{dense.key} {row['join']!r} is also that of {other['where']}: a caption would fit both"
                )
                faults.add(row["where"], f"{reason}; choose another --dense-key", row["source_id"])
                alive[number] = False


def rename(found: Listing, spool: Spool) -> dict[int, str]:
    """Keys that several images would share get a hash of the file's full name behind them."""
    renamed = {}
    for rows in _repeated(np.frombuffer(found.keys, "Q")):
        for number in rows:
            row = spool.row(int(number))
            renamed[int(number)] = f"{row['key']}-{hash64(row['source_id']):016x}"
    return renamed
