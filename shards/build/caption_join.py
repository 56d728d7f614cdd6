"""Joins captions that lie in files of their own (JSON lines or parquet) to the images, exactly.

The file is streamed once. What stays in memory is 24 bytes for each image of ours, whatever the size of the file;
the captions that match go to a memory-mapped spool on disk, where the workers find them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from d2s.common.files import parse_json
from d2s.shards.build.spool import SpoolWriter
from d2s.shards.format.sample import Faults, caption_fault, hash64

KEYS = ("filename", "image_id", "key", "sha256")
_BATCH = 8192
_SCHEMA = pa.schema(
    [("key", pa.string()), ("sparse", pa.list_(pa.string())), ("dense", pa.list_(pa.string()))]
)


@dataclass(frozen=True, kw_only=True)
class DenseOptions:
    """Where captions kept apart come from and how they find their images.

    `path` is a file or a folder of files; `key` says what is compared (one of KEYS) and `key_column` the column
    that holds it; `columns` hold dense captions and `sparse_columns` sparse ones, which replace the source's.
    `missing` and `extra` are "stop" or "allow": an image without a row, a row without an image.
    """

    path: Path
    key: str = "filename"
    key_column: str = ""
    columns: tuple[str, ...] = ("text",)
    sparse_columns: tuple[str, ...] = ()
    missing: str = "stop"
    extra: str = "stop"


@dataclass(frozen=True, slots=True)
class _Row:
    where: str
    key: str
    sparse: tuple
    dense: tuple


def files_of(path: Path) -> list[Path]:
    """The file itself, or the parquet or JSON-lines files of a folder by name. Raises ValueError if none."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path}: no such file")
    for pattern in ("*.parquet", "*.jsonl"):
        if found := sorted(path.glob(pattern)):
            return found
    raise ValueError(f"{path}: no .parquet and no .jsonl file in this folder")


def read_rows(path: Path, columns: list[str] | None, faults: Faults) -> Iterator[tuple[str, dict]]:
    """Yields ("file: line 3", row) from JSON lines, or ("file: row 3", row) from parquet.

    `columns` are those that parquet reads and that every row must have; None takes all.
    """
    if path.suffix == ".parquet":
        yield from _parquet_rows(path, columns)
        return
    try:
        # Only "\n" ends a line: a lone carriage return may stand between the parts of a JSON value.
        file = open(path, encoding="utf-8", newline="\n")  # noqa: SIM115 (closed by the with below)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    with file:
        number = 0
        try:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"{path}: line {number}"
                try:
                    row = parse_json(line)
                except ValueError as error:
                    faults.add(where, f"not JSON: {getattr(error, 'msg', error)}")
                    continue
                if not isinstance(row, dict):
                    faults.add(where, f"not a JSON object but {type(row).__name__}")
                    continue
                lacking = [name for name in columns or () if name not in row]
                if lacking:
                    faults.add(where, f"no field {lacking[0]!r}; there are {', '.join(sorted(row))}")
                    continue
                yield where, row
        except UnicodeDecodeError:
            raise ValueError(f"{path}: after line {number}: not UTF-8 text") from None


def _parquet_rows(path: Path, columns: list[str] | None) -> Iterator[tuple[str, dict]]:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not readable as parquet: {str(error).splitlines()[0]}") from None
    with file:
        names = file.schema_arrow.names
        for name in columns or ():
            if name not in names:
                raise ValueError(f"{path}: no column {name!r}; there are {', '.join(names)}")
        number = 0
        for batch in file.iter_batches(batch_size=_BATCH, columns=columns):
            for row in batch.to_pylist():
                yield f"{path}: row {number}", row
                number += 1


def texts(row: dict, columns: tuple[str, ...]) -> tuple:
    """The captions in these columns, in order; a column holds one text or a list of them."""
    found: list = []
    for name in columns:
        value = row.get(name)
        found.extend(value if isinstance(value, list) else [value])
    return tuple(text.strip() if isinstance(text, str) else text for text in found)


def _rows(options: DenseOptions, faults: Faults) -> Iterator[_Row]:
    key_column = options.key_column or options.key
    columns = list(dict.fromkeys([key_column, *options.columns, *options.sparse_columns]))
    for path in files_of(options.path):
        for where, row in read_rows(path, columns, faults):
            key = row[key_column]
            if key is None or isinstance(key, (list, dict)) or key == "":
                faults.add(where, f"field {key_column!r} holds no key")
                continue
            key = str(key).lower() if options.key == "sha256" else str(key)
            yield _Row(where, key, texts(row, options.sparse_columns), texts(row, options.columns))


def _lacking(options: DenseOptions, row: _Row) -> str | None:
    """An empty list where captions were to be: the image would go without them, unseen."""
    for columns, found in ((options.columns, row.dense), (options.sparse_columns, row.sparse)):
        if columns and not found:
            return f"no caption in {', '.join(columns)}"
    return None


def join(
    options: DenseOptions,
    hashes: np.ndarray,
    alive: np.ndarray,
    spool: Path,
    faults: Faults,
    name_of: Callable[[int], str],
) -> tuple[np.ndarray, int]:
    """Finds the row of captions of every image.

    Args:
        hashes: uint64 (images,), `hash64` of what the images are joined by.
        alive: bool (images,), False for an image that is left out already; set False for those left out here.
        spool: the captions that matched are written here, with their key, so that a reader can compare it.
        name_of: image number -> its name in an error message.

    Returns:
        int64 (images,), the row in the spool or -1; and how many rows of the file had no image.
    """
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    matched = np.full(len(hashes), -1, np.int64)
    extra = 0
    rows = _rows(options, faults)
    with SpoolWriter(spool, _SCHEMA) as writer:
        while batch := list(islice(rows, _BATCH)):
            wanted = np.array([hash64(row.key) for row in batch], np.uint64)
            lefts, rights = (
                np.searchsorted(ordered, wanted, "left"),
                np.searchsorted(ordered, wanted, "right"),
            )
            for row, left, right in zip(batch, lefts, rights, strict=True):
                images = order[left:right]
                if not len(images):
                    extra += 1
                    if options.extra == "stop":
                        faults.add(row.where, f"{options.key} {row.key!r} belongs to no image", row.key)
                elif matched[images[0]] >= 0:
                    faults.add(row.where, f"{options.key} {row.key!r} stands here a second time", row.key)
                elif reason := caption_fault(row.sparse + row.dense) or _lacking(options, row):
                    faults.add(row.where, f"{options.key} {row.key!r}: {reason}", row.key)
                    alive[images] = False
                else:
                    matched[images] = writer.length
                    writer.append({"key": row.key, "sparse": list(row.sparse), "dense": list(row.dense)})
    if options.missing == "stop":
        for image in np.flatnonzero(alive & (matched < 0)):
            reason = f"{name_of(image)} has no row here; --dense-missing allow builds it without"
            faults.add(str(options.path), reason, name_of(image))
            alive[image] = False
    return matched, extra
