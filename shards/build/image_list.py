"""Lists the images of a source, and finds the faults that do not require decoding every image."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path

import numpy as np

from d2s.shards.build import missing_file
from d2s.shards.build.caption_join import JoinOptions
from d2s.shards.format.image_file import check_image, has_valid_ends
from d2s.shards.format.keys import clean_key, hash64
from d2s.shards.format.row_file import RowFile, RowFileWriter
from d2s.shards.sources.entry import Entry
from d2s.shards.sources.faults import Faults, caption_fault, is_integer

_CHECKED_AT_ONCE = 4096
_ENTRY_FIELDS = tuple(field.name for field in fields(Entry))
# The types of the arrays in `ImageList.numbers`. Type Q is for 64-bit hashes of strings. `bytes` is the size
# of the image file, or -1 if unknown; `captions` is the number of captions, or -1 if not known yet.
_KINDS = dict.fromkeys(("source_id", "given", "key", "join", "order"), "Q")
_KINDS |= {"image_id": "q", "bytes": "q", "captions": "q", "split": "h", "tar": "i"}


def read_bytes(entry: Entry) -> bytes:
    """Reads the encoded image of an entry. Raises OSError if the file cannot be read."""
    with open(entry.path, "rb") as file:
        if entry.offset < 0:
            return file.read()
        file.seek(entry.offset)
        return file.read(entry.size)


@dataclass
class ImageList:
    """The images of a source. Each has a row in a file on disk, and an element in each array in memory."""

    rows: RowFile
    """the fields of each image's `Entry`, and two more: `join`, the key of its row of separate captions,
    and `given`, the key that the source gave and that must be unique, if any"""
    numbers: dict[str, np.ndarray]
    """maps each name in _KINDS to an array of shape (images,)"""
    usable: np.ndarray
    """bool (images,); False for images that have been excluded"""
    splits: list[str]
    """names of the splits; numbers["split"] has positions in this list"""
    tars: list[str]
    """paths of the tars; numbers["tar"] has positions in this list, or -1 for an image in no tar"""

    def groups(self) -> dict[str, np.ndarray]:
        """Maps each split with a valid name to the numbers of its usable images, as an int64 array."""
        named = [(code, name) for code, name in enumerate(self.splits) if not _split_fault(name)]
        return {name: np.flatnonzero(self.usable & (self.numbers["split"] == code)) for code, name in named}


def list_images(
    entries: Iterable[Entry], path: Path, join: JoinOptions | None, seed: int, faults: Faults
) -> ImageList:
    """Lists all images and writes their rows to `path`. Unusable images are listed and added to `faults`."""
    secret = str(seed).encode()
    columns = {name: array(kind) for name, kind in _KINDS.items()}
    usable, splits, tars = array("b"), {}, {}
    entries = iter(entries)
    with RowFileWriter(path) as writer, ThreadPoolExecutor(8) as pool:
        while batch := list(islice(entries, _CHECKED_AT_ONCE)):
            for entry, (size, file_fault) in zip(batch, pool.map(_check_file, batch), strict=True):
                reason = file_fault or _entry_fault(entry)
                if reason:
                    faults.add(entry.where, reason, entry.source_id)
                row = _row(entry, len(writer), join, readable=file_fault is None, usable=not reason)
                numbers = {
                    "source_id": hash64(entry.source_id),
                    "image_id": row["image_id"],
                    "given": hash64(row["given"]),
                    "key": hash64(row["key"]),
                    "join": hash64(row["join"]),
                    "order": hash64(entry.source_id, secret),
                    "bytes": size,
                    "captions": -1 if entry.number >= 0 else len(entry.sparse) + len(entry.dense),
                    "split": splits.setdefault(entry.split, len(splits)),
                    "tar": tars.setdefault(entry.path, len(tars)) if entry.in_tar else -1,
                }
                for name, value in numbers.items():
                    columns[name].append(value)
                usable.append(not reason)
                writer.append(row)
    return ImageList(
        rows=RowFile(path),
        numbers={name: np.array(column) for name, column in columns.items()},
        usable=np.array(usable, bool),
        splits=list(splits),
        tars=list(tars),
    )


def _row(entry: Entry, number: int, join: JoinOptions | None, readable: bool, usable: bool) -> dict:
    row = {name: getattr(entry, name) for name in _ENTRY_FIELDS}
    row["key"] = clean_key(entry.key or entry.source_id)
    if entry.image_id is None or _id_fault(entry.image_id):
        row["image_id"] = number
    # Keys from tars may repeat; `unique_keys` changes them later. Keys from a table must be unique.
    row["given"] = entry.key if entry.key and not entry.in_tar else ""
    row["join"] = _join_value(entry, row, join, readable)
    if usable:
        row |= {kind: [caption.strip() for caption in row[kind]] for kind in ("sparse", "dense")}
    return row


def _join_value(entry: Entry, row: dict, join: JoinOptions | None, readable: bool) -> str:
    """Returns the key that an image's row of separate captions must have; "" if `join` is None.

    Unusable images need a key too. Otherwise their rows would be reported as rows without an image.
    """
    if join is None:
        return ""
    if join.key == "sha256":
        if not entry.sha256 and entry.path and readable:
            return hashlib.sha256(read_bytes(entry)).hexdigest()
        return entry.sha256.lower()
    if join.key == "image_id":
        return str(row["image_id"])
    return entry.key or row["key"] if join.key == "key" else entry.filename or entry.source_id


def _split_fault(split: str) -> str | None:
    if split.isascii() and split.replace("-", "").replace("_", "").isalnum():
        return None
    return f"split {split!r} is not a name of letters, digits, - and _"


def _entry_fault(entry: Entry) -> str | None:
    faults = (caption_fault(entry.sparse + entry.dense), _split_fault(entry.split), _id_fault(entry.image_id))
    return next(filter(None, faults), None) or _name_fault(entry)


def _id_fault(image_id: object) -> str | None:
    if image_id is None or (is_integer(image_id) and abs(image_id) < 2**63):
        return None
    return f"image id {image_id!r} is not a whole number of 64 bits"


def _name_fault(entry: Entry) -> str | None:
    """Returns a fault if a name of the entry is not valid Unicode, else None.

    Names in tars may have any bytes, and names in JSON may have unpaired surrogates. Neither can be stored.
    """
    for name in (entry.source_id, entry.key or "", entry.path, entry.filename, entry.sha256):
        if name and not name.isascii() and caption_fault((name,)):
            return f"name {name!r} is not valid Unicode"
    return None


def _check_file(entry: Entry) -> tuple[int, str | None]:
    """Returns (size in bytes or -1, fault or None). Decodes an image only if its ends look damaged."""
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
        return -1, f"image {entry.path} does not exist{missing_file.remedy(entry.path)}"
    except OSError as error:
        return -1, f"image {entry.path}: {error.strerror}"
    if has_valid_ends(head, tail, size):
        return size, None
    try:
        check_image(read_bytes(entry))
    except ValueError as error:
        return size, f"image {entry.path}: {error}"
    return size, None


def _repeated(values: np.ndarray) -> Iterator[list[int]]:
    """Yields a list of positions, in ascending order, for each value that occurs more than once."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    for group in np.split(order, np.flatnonzero(ordered[1:] != ordered[:-1]) + 1):
        if len(group) > 1:
            yield group.tolist()


def exclude_duplicates(images: ImageList, faults: Faults) -> None:
    """Excludes images that have the same name, image id or given key as an earlier image."""
    for column, label in (("source_id", "image"), ("image_id", "image id"), ("given", "key")):
        for numbers in _repeated(images.numbers[column]):
            first = images.rows.row(numbers[0])
            if first[column] == "":
                continue
            for number in numbers[1:]:
                row = images.rows.row(number)
                if images.usable[number] and row[column] == first[column]:
                    reason = f"{label} {row[column]!r} stands here a second time (first: {first['where']})"
                    faults.add(row["where"], reason, row["source_id"])
                    images.usable[number] = False


def exclude_ambiguous(images: ImageList, join: JoinOptions, faults: Faults) -> None:
    """Excludes images that have the same join key as an image of another name: captions would fit both."""
    if join.key == "sha256":
        # Images with the same checksum are equal, so the same captions describe them.
        return
    for numbers in _repeated(images.numbers["join"]):
        rows = [images.rows.row(number) for number in numbers]
        for number, row in zip(numbers, rows, strict=True):
            others = (other for other in rows if other["source_id"] != row["source_id"])
            other = next((other for other in others if other["join"] == row["join"]), None)
            if images.usable[number] and other is not None:
                both = (
                    f"{join.key} {row['join']!r} is also that of {other['where']}: a caption would fit both"
                )
                faults.add(row["where"], f"{both}; choose another --dense-key", row["source_id"])
                images.usable[number] = False


def unique_keys(images: ImageList) -> dict[int, str]:
    """Maps the number of each image with a repeated key to a new key: old key plus a hash of its name."""
    renamed = {}
    for number in (number for group in _repeated(images.numbers["key"]) for number in group):
        row = images.rows.row(number)
        renamed[number] = f"{row['key']}-{hash64(row['source_id']):016x}"
    return renamed
