"""Joins captions from separate files (JSON, CSV or parquet) to images by an exact key.

The files are read once, as a stream. Matching captions go to a memory-mapped file, which the workers read. So
memory holds only 24 bytes for each image, however large the files are.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from d2s.common.messages import shorten
from d2s.shards.format.keys import hash64
from d2s.shards.format.row_file import RowFileWriter
from d2s.shards.sources.caption_files import captions_of, list_files, read_rows
from d2s.shards.sources.faults import Faults, caption_fault, whole_number

KEYS = ("filename", "image_id", "key", "sha256")
_BATCH = 8192


@dataclass(frozen=True, kw_only=True)
class JoinOptions:
    """Where separate captions come from, and how they are matched with images."""

    path: Path
    """a file, or a folder of files"""
    key: str = "filename"
    """one of KEYS: the property of an image that must equal the key of its row"""
    key_column: str = ""
    """name of the column that contains the key; "" means the same name as `key`"""
    columns: tuple[str, ...] = ("text",)
    """names of the columns with dense captions"""
    sparse_columns: tuple[str, ...] = ()
    """names of the columns with sparse captions. They replace the sparse captions of the source."""
    missing: str = "stop"
    """"stop" or "allow": what to do if an image has no row"""
    extra: str = "stop"
    """"stop" or "allow": what to do if a row has no image"""
    repeated: str = "stop"
    """"stop" or "allow": what to do if an image has several rows; "allow" adds the captions of all"""


@dataclass(frozen=True, slots=True)
class _Row:
    where: str
    key: str
    sparse: tuple
    dense: tuple


def _read(options: JoinOptions, faults: Faults) -> Iterator[_Row]:
    key_column = options.key_column or options.key
    columns = {key_column: "--dense-key-column"} | dict.fromkeys(options.columns, "--dense-columns")
    columns |= dict.fromkeys(options.sparse_columns, "--sparse-columns")
    for path in list_files(options.path):
        for where, row in read_rows(path, columns, faults):
            key = row[key_column]
            if isinstance(key, float) or options.key == "image_id":
                key = whole_number(key)
            if key is None or isinstance(key, (list, dict)) or key == "":
                faults.add(where, f"field {key_column!r} holds no key")
                continue
            key = str(key).lower() if options.key == "sha256" else str(key)
            yield _Row(
                where, key, captions_of(row, options.sparse_columns), captions_of(row, options.columns)
            )


def _fault(options: JoinOptions, row: _Row) -> str | None:
    """Returns the reason why the captions of a row cannot be used, or None."""
    # An empty list would silently leave the image without these captions.
    for columns, found in ((options.columns, row.dense), (options.sparse_columns, row.sparse)):
        if columns and not found:
            return f"no caption in {', '.join(columns)}"
    return caption_fault(row.sparse + row.dense)


class _Names:
    """Finds images by join key. Can also match file names if only one of image and row includes folders."""

    def __init__(self, hashes: np.ndarray, name_of: Callable[[int], str]) -> None:
        self._order = np.argsort(hashes, kind="stable")
        self._ordered = hashes[self._order]
        self._name_of = name_of
        self._bases: _Names | None = None
        self._found, self._first = 0, ""

    def find(self, wanted: np.ndarray) -> list[np.ndarray]:
        """Returns, for each hash in `wanted`, the numbers of the images with that join key."""
        starts, stops = (np.searchsorted(self._ordered, wanted, side) for side in ("left", "right"))
        return [self._order[start:stop] for start, stop in zip(starts, stops, strict=True)]

    def find_in_other_folder(self, row: _Row) -> np.ndarray:
        """Returns images whose name equals the row's once leading folders are removed from one of the two."""
        folders = row.key.replace("\\", "/").split("/")
        ends = ["/".join(folders[number:]) for number in range(1, len(folders))]
        if ends:
            found = self.find(np.array([hash64(end) for end in ends], np.uint64))
        else:
            if self._bases is None:
                names = (self._name_of(number) for number in range(len(self._order)))
                hashes = (hash64(name.rsplit("/", 1)[1] if "/" in name else "") for name in names)
                self._bases = _Names(np.fromiter(hashes, np.uint64, len(self._order)), self._name_of)
            found = self._bases.find(np.array([hash64(row.key)], np.uint64))
        images = next((images for images in found if len(images)), self._order[:0])
        if len(images):
            self._found += 1
            self._first = self._first or f"{row.key!r} with {self._name_of(images[0])!r}, {row.where}"
        return images

    def example(self) -> str:
        """Returns the end of an error message: the name of one image, as an example."""
        return f"; an image here is {shorten(repr(self._name_of(0)), 80)}" if len(self._order) else ""

    def report(self, path: Path) -> None:
        """Prints how many rows `find_in_other_folder` matched. path: the caption file."""
        if self._found:
            print(
                f"{path}: {self._found:,} names were joined without their folders ({self._first})",
                file=sys.stderr,
            )


def join_captions(
    options: JoinOptions,
    hashes: np.ndarray,
    usable: np.ndarray,
    path: Path,
    faults: Faults,
    name_of: Callable[[int], str],
) -> tuple[np.ndarray, int]:
    """Finds the row of captions for each image, and reports rows and images without a match.

    Args:
        hashes: uint64 (images,), `hash64` of each image's join key.
        usable: bool (images,), False for excluded images. Is set to False for images excluded here.
        path: file to write; gets a row for each matching input row: its captions and key.
        name_of: maps the number of an image to its name.

    Returns:
        (rows, extra): int64 (images,), the number of each image's last row in `path`, or -1; and the number
            of input rows without an image.
    """
    names = _Names(hashes, name_of)
    matched = np.full(len(hashes), -1, np.int64)
    extra = 0
    rows = _read(options, faults)
    with RowFileWriter(path) as writer:
        while batch := list(islice(rows, _BATCH)):
            wanted = np.array([hash64(row.key) for row in batch], np.uint64)
            for row, images in zip(batch, names.find(wanted), strict=True):
                name, key = f"{options.key} {shorten(repr(row.key))}", row.key
                if not len(images) and options.key == "filename":
                    images = names.find_in_other_folder(row)
                    key = name_of(images[0]) if len(images) else key
                if not len(images):
                    extra += 1
                    if options.extra == "stop":
                        remedy = "; --dense-extra allow skips such rows"
                        faults.add(row.where, f"{name} belongs to no image{names.example()}{remedy}", row.key)
                elif key != row.key and any(name_of(image) != key for image in images):
                    faults.add(row.where, f"{name} fits several images; write it with its folder", row.key)
                elif matched[images[0]] >= 0 and options.repeated == "stop":
                    remedy = "--dense-repeated allow adds its captions"
                    faults.add(row.where, f"{name} stands here a second time; {remedy}", row.key)
                elif reason := _fault(options, row):
                    faults.add(row.where, f"{name}: {reason}", row.key)
                    usable[images] = False
                else:
                    captions = {"key": key, "sparse": row.sparse, "dense": row.dense}
                    if matched[images[0]] >= 0:
                        captions["previous"] = int(matched[images[0]])
                    matched[images] = len(writer)
                    writer.append(captions)
    names.report(options.path)
    if options.missing == "stop":
        for image in np.flatnonzero(usable & (matched < 0)):
            reason = f"{name_of(image)} has no row here; --dense-missing allow builds it without"
            faults.add(str(options.path), reason, name_of(image))
            usable[image] = False
    return matched, extra
