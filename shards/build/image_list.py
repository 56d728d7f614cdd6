"""Lists the images of a source, and checks what can be checked without decoding every image."""

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from d2s.shards.build.caption_join import JoinOptions
from d2s.shards.build.row_file import RowFile, RowFileWriter
from d2s.shards.format.image_file import check_image, has_valid_ends
from d2s.shards.format.keys import clean_key, hash64
from d2s.shards.sources.entry import Entry
from d2s.shards.sources.faults import Faults, caption_fault, is_integer

_ENTRY_FIELDS = tuple(field.name for field in fields(Entry))
_STRINGS = ("split", "source_id", "where", "key", "path", "sha256", "filename")
# Columns beside the fields of an entry: `join` is what separate captions are joined by, `given` a key that the source
# gave and that must be unique, `bytes` the size of the image file, `captions` the number of captions (-1: unknown).
_MORE_STRINGS = ("join", "given")
_HASHES = ("source_id_hash", "key_hash", "join_hash", "given_hash", "order_hash")
_SCHEMA = pa.schema(
    [(name, pa.string()) for name in (*_STRINGS, *_MORE_STRINGS)]
    + [(name, pa.int64()) for name in ("image_id", "offset", "size", "number", "seed", "bytes", "captions")]
    + [(name, pa.list_(pa.string())) for name in ("sparse", "dense")]
    + [(name, pa.uint64()) for name in _HASHES]
    + [("usable", pa.bool_())]
)
_CHECKED_AT_ONCE = 4096


def read_bytes(entry: Entry) -> bytes:
    """The encoded image of an entry. Raises OSError if the file cannot be read."""
    with open(entry.path, "rb") as file:
        if entry.offset < 0:
            return file.read()
        file.seek(entry.offset)
        return file.read(entry.size)


def entry_of(row: dict) -> Entry:
    """The entry in a row of the list."""
    values = {name: row[name] for name in _ENTRY_FIELDS}
    return Entry(**values | {"sparse": tuple(row["sparse"]), "dense": tuple(row["dense"])})


def list_images(
    entries: Iterable[Entry], path: Path, join: JoinOptions | None, seed: int, faults: Faults
) -> RowFile:
    """Writes a row for each entry to `path`; entries that cannot be used are marked, and go to `faults`."""
    secret = str(seed).encode()
    entries = iter(entries)
    with RowFileWriter(path, _SCHEMA) as writer, ThreadPoolExecutor(8) as pool:
        while batch := list(islice(entries, _CHECKED_AT_ONCE)):
            for entry, (size, file_fault) in zip(batch, pool.map(_check_file, batch), strict=True):
                reason = file_fault or _entry_fault(entry)
                if reason:
                    faults.add(entry.where, reason, entry.source_id)
                row = _row(entry, writer.length, join, readable=file_fault is None, usable=not reason)
                row["bytes"] = size
                row["order_hash"] = hash64(entry.source_id, secret)
                writer.append(row)
    return RowFile(path)


def _row(entry: Entry, number: int, join: JoinOptions | None, readable: bool, usable: bool) -> dict:
    row = {name: getattr(entry, name) for name in _ENTRY_FIELDS}
    row["key"] = clean_key(entry.key or entry.source_id)
    if entry.image_id is None or _id_fault(entry.image_id):
        row["image_id"] = number
    # Keys of tars repeat from tar to tar and are made unique later; a key in a table must be unique.
    row["given"] = entry.key if entry.key and entry.offset < 0 else ""
    row["join"] = _join_value(entry, row, join, readable)
    for name in ("source_id", "key", "join", "given"):
        row[f"{name}_hash"] = hash64(row[name])
    row["captions"] = -1 if entry.number >= 0 else len(entry.sparse) + len(entry.dense)
    row["usable"] = usable
    # Captions of an unusable entry may be of any type; nobody will ask for them.
    for kind in ("sparse", "dense"):
        row[kind] = [caption.strip() for caption in row[kind]] if usable else []
    if not usable:
        row |= {name: row[name].encode("utf-8", "replace").decode() for name in (*_STRINGS, *_MORE_STRINGS)}
    return row


def _join_value(entry: Entry, row: dict, join: JoinOptions | None, readable: bool) -> str:
    """What a row of separate captions must hold. Unusable images have one too, so that their row is no stranger."""
    if join is None:
        return ""
    if join.key == "sha256":
        if not entry.sha256 and entry.path and readable:
            return hashlib.sha256(read_bytes(entry)).hexdigest()
        return entry.sha256.lower()
    if join.key == "image_id":
        return str(row["image_id"])
    return entry.key or row["key"] if join.key == "key" else entry.filename or entry.source_id


def split_fault(split: str) -> str | None:
    """Why a split cannot have this name, or None."""
    if split.isascii() and split.replace("-", "").replace("_", "").isalnum():
        return None
    return f"split {split!r} is not a name of letters, digits, - and _"


def _entry_fault(entry: Entry) -> str | None:
    faults = (caption_fault(entry.sparse + entry.dense), split_fault(entry.split), _id_fault(entry.image_id))
    return next(filter(None, faults), None) or _name_fault(entry)


def _id_fault(image_id: object) -> str | None:
    if image_id is None or (is_integer(image_id) and abs(image_id) < 2**63):
        return None
    return f"image id {image_id!r} is not a whole number of 64 bits"


def _name_fault(entry: Entry) -> str | None:
    """Names in tars are bytes and names in JSON may hold unpaired surrogates; only Unicode can be stored."""
    for name in (entry.source_id, entry.key or "", entry.path, entry.filename, entry.sha256):
        if name and not name.isascii() and caption_fault((name,)):
            return f"name {name!r} is not valid Unicode"
    return None


def _check_file(entry: Entry) -> tuple[int, str | None]:
    """Size of the image file, and why it cannot be used, or None. Decodes only files with suspicious ends."""
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
    if has_valid_ends(head, tail, size):
        return size, None
    try:
        check_image(read_bytes(entry))
    except ValueError as error:
        return size, f"image {entry.path}: {error}"
    return size, None


def _repeated(values: np.ndarray) -> Iterator[np.ndarray]:
    """Groups of rows with equal values, each group in row order."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    for group in np.split(order, np.flatnonzero(ordered[1:] != ordered[:-1]) + 1):
        if len(group) > 1:
            yield group


def exclude_duplicates(images: RowFile, usable: np.ndarray, faults: Faults) -> None:
    """Excludes images whose name, image id or given key an earlier image has already."""
    columns = (("source_id", "image", "source_id_hash"), ("image_id", "image id", "image_id"))
    for column, label, values in (*columns, ("given", "key", "given_hash")):
        for numbers in _repeated(images.column(values)):
            first = images.row(int(numbers[0]))
            if first[column] == "":
                continue
            for number in numbers[1:]:
                row = images.row(int(number))
                if usable[number] and row[column] == first[column]:
                    reason = f"{label} {row[column]!r} stands here a second time (first: {first['where']})"
                    faults.add(row["where"], reason, row["source_id"])
                    usable[number] = False


def exclude_ambiguous(images: RowFile, usable: np.ndarray, join: JoinOptions, faults: Faults) -> None:
    """Excludes images to which the same row of separate captions would be joined."""
    if join.key == "sha256":
        # Images of one checksum are equal, so the same captions describe them.
        return
    for numbers in _repeated(images.column("join_hash")):
        rows = [images.row(int(number)) for number in numbers]
        for number, row in zip(numbers, rows, strict=True):
            others = (other for other in rows if other["source_id"] != row["source_id"])
            other = next((other for other in others if other["join"] == row["join"]), None)
            if usable[number] and other is not None:
                reason = (
                    f"{join.key} {row['join']!r} is also that of {other['where']}: a caption would fit both"
                )
                faults.add(row["where"], f"{reason}; choose another --dense-key", row["source_id"])
                usable[number] = False


def unique_keys(images: RowFile) -> dict[int, str]:
    """New keys for images whose keys are equal: with a hash of the file's full name at the end."""
    renamed = {}
    for numbers in _repeated(images.column("key_hash")):
        for number in numbers.tolist():
            row = images.row(number)
            renamed[number] = f"{row['key']}-{hash64(row['source_id']):016x}"
    return renamed
