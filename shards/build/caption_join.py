"""Joins captions from separate files (JSON lines or parquet) to images by an exact key.

The files are read once, as a stream. However large they are, memory holds only 24 bytes for each image:
matching captions are written to a memory-mapped file, from which the workers read them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from d2s.shards.build.row_file import RowFileWriter
from d2s.shards.format.keys import hash64
from d2s.shards.sources.caption_files import captions_of, list_files, read_rows
from d2s.shards.sources.faults import Faults, caption_fault

KEYS = ("filename", "image_id", "key", "sha256")
_BATCH = 8192


@dataclass(frozen=True, kw_only=True)
class JoinOptions:
    """Where separate captions come from, and how they are matched with images."""

    path: Path
    """a file, or a folder of files"""
    key: str = "filename"
    """the property of an image that is compared with the key of a row, one of KEYS"""
    key_column: str = ""
    """the column that contains the key; "" means the column with the name `key`"""
    columns: tuple[str, ...] = ("text",)
    """columns with dense captions"""
    sparse_columns: tuple[str, ...] = ()
    """columns with sparse captions, which replace those of the source"""
    missing: str = "stop"
    """"stop" or "allow": what to do if an image has no row"""
    extra: str = "stop"
    """"stop" or "allow": what to do if a row has no image"""


@dataclass(frozen=True, slots=True)
class _Row:
    where: str
    key: str
    sparse: tuple
    dense: tuple


def _read(options: JoinOptions, faults: Faults) -> Iterator[_Row]:
    key_column = options.key_column or options.key
    columns = list(dict.fromkeys([key_column, *options.columns, *options.sparse_columns]))
    for path in list_files(options.path):
        for where, row in read_rows(path, columns, faults):
            key = row[key_column]
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


def join_captions(
    options: JoinOptions,
    hashes: np.ndarray,
    usable: np.ndarray,
    path: Path,
    faults: Faults,
    name_of: Callable[[int], str],
) -> tuple[np.ndarray, int]:
    """Finds the row with the captions of each image.

    Args:
        hashes: uint64 (images,), `hash64` of each image's join key.
        usable: bool (images,), False for excluded images. Images that are excluded here become False.
        path: file to which the matching captions are written, each with its key.
        name_of: returns an image's name for error messages, given its number.

    Returns:
        int64 (images,), each image's row in `path`, or -1; and the number of input rows that have no image.
    """
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    matched = np.full(len(hashes), -1, np.int64)
    extra = 0
    rows = _read(options, faults)
    with RowFileWriter(path) as writer:
        while batch := list(islice(rows, _BATCH)):
            wanted = np.array([hash64(row.key) for row in batch], np.uint64)
            starts, stops = (np.searchsorted(ordered, wanted, side) for side in ("left", "right"))
            for row, start, stop in zip(batch, starts, stops, strict=True):
                images = order[start:stop]
                name = f"{options.key} {row.key!r}"
                if not len(images):
                    extra += 1
                    if options.extra == "stop":
                        faults.add(row.where, f"{name} belongs to no image", row.key)
                elif matched[images[0]] >= 0:
                    faults.add(row.where, f"{name} stands here a second time", row.key)
                elif reason := _fault(options, row):
                    faults.add(row.where, f"{name}: {reason}", row.key)
                    usable[images] = False
                else:
                    matched[images] = len(writer)
                    writer.append({"key": row.key, "sparse": row.sparse, "dense": row.dense})
    if options.missing == "stop":
        for image in np.flatnonzero(usable & (matched < 0)):
            reason = f"{name_of(image)} has no row here; --dense-missing allow builds it without"
            faults.add(str(options.path), reason, name_of(image))
            usable[image] = False
    return matched, extra
