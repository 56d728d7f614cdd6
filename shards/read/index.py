"""Reads the index of a data set. Processes share its fixed-width columns, which are memory-mapped.

Opening an index reads only the footer of its file, so it is as fast for a hundred million rows as for a
thousand. Columns are views of the mapped file. No function here copies a whole column.
"""

import json
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from d2s.shards.format import index_file, manifest
from d2s.shards.format.file_names import INDEX, MANIFEST, SIDECAR
from d2s.shards.order import draws
from d2s.shards.read.shard_files import check_files, check_lengths

I64 = NDArray[np.int64]
_PLACE = ("shard", "image_offset", "image_size", "json_offset", "json_size", "crc32")
# If the index has more rows, `open` checks only whether the shards exist, and not their lengths.
_SIZED_ROWS = 5_000_000
# The operating system maps 16 pages for each page that is read. After every _TRIM_AFTER values that are read, all
# pages are released, so that the whole file does not count as resident memory of the process.
_TRIM_AFTER = 1 << 12


class DamagedSample(ValueError):
    """Raised for a sample that cannot be used. The message, one line, names shard, key or row, and reason."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(shard, key, reason)
        self.shard, self.key, self.reason = shard, key, reason

    def __str__(self) -> str:
        return f"{self.shard}: {self.key}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class Location:
    """Says where the image and the captions of a row are stored. Offsets and sizes are in bytes."""

    shard: str
    image_offset: int
    image_size: int
    json_file: str
    json_offset: int
    json_size: int
    crc32: int


class ShardIndex:
    """An opened index. `ShardIndex.open(folder)` opens it. It is safe to pickle and to fork.

    Rows are numbered across the whole data set, and each split is a range of rows.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        path = root / INDEX
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            reader = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(self._map)))
            batch = reader.get_batch(0)
            meta = _check(batch, reader.schema)
            columns = {name: batch.column(name) for name in index_file.COLUMNS}
            self._columns = {name: column.to_numpy(zero_copy_only=True) for name, column in columns.items()}
        except (ValueError, OSError, KeyError, TypeError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())
            message = f"{path} is not an Arrow file of ours ({reason}): build the data set again"
            raise ValueError(message) from None
        self.shards: list[str] = meta["shards"]
        self.splits: dict[str, tuple[int, int]] = {name: tuple(ends) for name, ends in meta["splits"].items()}
        self._sidecar = meta["json"] == "sidecar"
        self._touched = 0

    @classmethod
    def open(cls, root: str | Path) -> "ShardIndex":
        """Opens the index of data set `root`. Checks that all shards exist and, up to 5 million rows, their lengths.

        Raises:
            ValueError: `root` was not made by `python -m d2s.shard`, or a shard is missing or cut short.
        """
        root = Path(root)
        if not root.is_dir():
            raise ValueError(
                f"data is {str(root)!r}, which is no folder: make it with python -m d2s.shard build"
            )
        for name, command in ((MANIFEST, "build"), (INDEX, f"index {root}")):
            if not (root / name).is_file():
                raise ValueError(f"{root} has no {name}: make it with python -m d2s.shard {command}")
        index = cls(root)
        names = [*index.shards, *([SIDECAR] if index._sidecar else [])]
        sizes = check_files(root, names, sized=len(index) <= _SIZED_ROWS)
        if len(index) <= _SIZED_ROWS:
            check_lengths(root, {name: index._columns[name] for name in _PLACE}, names, sizes, index._sidecar)
            index._release(_TRIM_AFTER)
        return index

    def __reduce__(self) -> tuple:
        return type(self), (self.root,)

    def __len__(self) -> int:
        return len(self._columns["shard"])

    def rows(self, split: str) -> range:
        """Returns the row numbers of a split.

        Raises:
            ValueError: the split does not exist or is empty.
        """
        start, stop = self.splits.get(split, (0, 0))
        if start == stop:
            there = ", ".join(f"{name} ({b - a})" for name, (a, b) in self.splits.items() if b > a)
            raise ValueError(
                f"split {split!r} of {self.root} has no image: the data set has {there or 'nothing'}"
            )
        return range(start, stop)

    def column(self, name: str) -> NDArray:
        """Returns a whole column, of shape (rows,), as a view of the file. Slices of it are views, too."""
        return self._columns[name]

    def take(self, name: str, rows: I64) -> NDArray:
        """Returns a column's values at int64 `rows`. Both have shape (k,). Limits how much memory pages take."""
        values = self._columns[name][rows]
        self._release(len(values))
        return values

    def total(self, split: str, kind: str) -> int:
        """Returns how many captions `split` has. kind: which captions, "sparse" or "dense"."""
        rows = self.rows(split)
        starts, counts = self._columns[f"{kind}_start"], self._columns[f"n_{kind}"]
        return int(starts[rows[-1]]) + int(counts[rows[-1]]) - int(starts[rows[0]])

    def n_sparse_total(self, split: str) -> int:
        """Returns how many pairs of an image and a sparse caption `split` has."""
        return self.total(split, "sparse")

    def pair(self, split: str, indices: I64, kind: str = "sparse") -> tuple[I64, I64]:
        """Finds the image and the caption of each pair. Pairs are numbered from 0 within `split`.

        Args:
            indices: the numbers of k pairs, int64 of shape (k,).
            kind: which captions are paired with the images, "sparse" or "dense".
        Returns:
            (rows, numbers), both int64 of shape (k,): the row of each image, and the caption's number in its image.
        """
        rows = self.rows(split)
        starts = self._columns[f"{kind}_start"][rows.start : rows.stop]
        wanted = np.asarray(indices, np.int64) + starts[0]
        local = np.searchsorted(starts, wanted, side="right") - 1
        numbers = wanted - starts[local]
        counts = self._columns[f"n_{kind}"][rows.start : rows.stop][local]
        if ((numbers < 0) | (numbers >= counts)).any():
            reason = f"its {kind} captions are not numbered one after the other"
            raise ValueError(f"{self.root / INDEX} is damaged: {reason}: build the data set again")
        self._release(len(local) * 17)
        return local + rows.start, numbers

    def without(self, split: str, kind: str) -> tuple[int, int]:
        """Returns how many images of `split` have no captions of `kind`, and the first such row or -1."""
        rows, chunk, count, first = self.rows(split), 1 << 22, 0, -1
        for start in range(rows.start, rows.stop, chunk):
            none = np.flatnonzero(self._columns[f"n_{kind}"][start : min(start + chunk, rows.stop)] == 0)
            if none.size and first < 0:
                first = start + int(none[0])
            count += none.size
            self._release(_TRIM_AFTER)
        return count, first

    def shard_sizes(self, split: str, unit: str = "rows") -> I64:
        """Returns the number of images (`unit` "rows") or captions ("sparse", "dense") in each shard of `split`."""
        rows = self.rows(split)
        shards = self._columns["shard"][rows.start : rows.stop]
        # Shards are numbered in row order. So bisection finds the first row of each shard without reading all rows.
        numbers = np.arange(shards[0], shards[-1] + 2, dtype=shards.dtype)
        borders = np.searchsorted(shards, numbers) + rows.start
        if unit != "rows":
            starts = self._columns[f"{unit}_start"]
            inner = starts[borders[:-1]]
            borders = np.append(inner, starts[rows.start] + self.total(split, unit))
        self._release(_TRIM_AFTER)
        return np.diff(borders)

    def location(self, row: int) -> Location:
        """Returns the location of a row. Raises DamagedSample if the row's shard number does not exist."""
        value = {name: int(self._columns[name][row]) for name in _PLACE}
        self._release(len(_PLACE))
        number = value.pop("shard")
        if not 0 <= number < len(self.shards):
            raise DamagedSample(INDEX, f"row {row}", f"is in shard {number} of {len(self.shards)}")
        shard = self.shards[number]
        return Location(shard=shard, json_file=SIDECAR if self._sidecar else shard, **value)

    def keys(self, rows: Sequence[int]) -> list[str]:
        """Returns the keys of `rows` from the manifest. This is slow, because each key costs a whole row group.

        Raises:
            ValueError: the manifest cannot be read.
        """
        try:
            with pq.ParquetFile(self.root / MANIFEST) as file:
                return [manifest.read_row(file, int(row), ["key"])["key"] for row in rows]
        except (OSError, pa.ArrowInvalid, pa.ArrowKeyError) as error:
            raise ValueError(f"{self.root / MANIFEST} cannot be read: {error}") from None

    def fingerprint(self) -> str:
        """Returns a hash of the number of rows, the splits and the shard names, to notice a replaced data set."""
        text = json.dumps([len(self), self.splits, self.shards], sort_keys=True)
        return f"{draws.hash_name(text):016x}"

    def _release(self, touched: int) -> None:
        """Counts `touched` more values as read. Releases all mapped pages if _TRIM_AFTER values were read."""
        self._touched += touched
        if self._touched >= _TRIM_AFTER and hasattr(mmap, "MADV_DONTNEED"):
            # The pages stay in the machine's page cache. They only stop counting as memory of this process.
            self._map.madvise(mmap.MADV_DONTNEED)
            self._touched = 0


def _check(batch: pa.RecordBatch, schema: pa.Schema) -> dict:
    """Returns the metadata of an index. If the index is damaged, raises an error that `ShardIndex` catches."""
    meta = json.loads((schema.metadata or {}).get(b"d2s", b"{}"))
    if not isinstance(meta, dict) or meta.get("version") != index_file.VERSION:
        raise ValueError(f"no index of version {index_file.VERSION}")
    batch.validate()
    if not schema.equals(index_file.index_schema([], {})) or any(column.null_count for column in batch):
        raise ValueError("other columns than an index has")
    if meta["json"] not in ("tar", "sidecar") or not all(isinstance(name, str) for name in meta["shards"]):
        raise ValueError("its list of shards is damaged")
    for name, (start, stop) in meta["splits"].items():
        if type(start) is not int or type(stop) is not int or not 0 <= start <= stop <= batch.num_rows:
            raise ValueError(f"split {name!r} has rows {[start, stop]} of {batch.num_rows}")
    return meta
