"""The index of a data set: the manifest's fixed-width columns, memory-mapped and shared by all processes.

Opening reads the file's footer only, so it takes the same time for a thousand rows and for a hundred million.
Columns are views of the mapping; nothing here copies a whole column.
"""

import json
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from d2s.shards.format import index_file, manifest
from d2s.shards.order import draws

I64 = NDArray[np.int64]
COLUMNS = tuple(index_file.index_schema([], {}).names)
_SIDECAR = "captions.jsonl"
_PLACE = ("shard", "image_offset", "image_size", "json_offset", "json_size", "crc32")
# Up to so many rows the size of every shard is compared with what the index says of it; beyond, that it is there.
_SIZED_ROWS = 5_000_000
# A gather touches pages all over the file and the kernel maps 16 pages around each fault. Let go of them after so
# many values, or every process would come to show the whole file as resident.
_TRIM_AFTER = 1 << 12


class DamagedSample(ValueError):
    """A sample that cannot be used. The message is one line and names shard, key or row, and reason."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(shard, key, reason)
        self.shard, self.key, self.reason = shard, key, reason

    def __str__(self) -> str:
        return f"{self.shard}: {self.key}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class Location:
    """Where a row's two members lie: file names relative to the data set, offsets and sizes in bytes."""

    shard: str
    image_offset: int
    image_size: int
    json_file: str
    json_offset: int
    json_size: int
    crc32: int


class ShardIndex:
    """An opened index. Rows are global: a split is a range of them. Safe to pickle and to fork.

    Make one with `ShardIndex.open(dir)`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        path = root / index_file.NAME
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            reader = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(self._map)))
            meta = json.loads((reader.schema.metadata or {}).get(b"d2s", b"{}"))
            if not isinstance(meta, dict) or meta.get("version") != index_file.VERSION:
                raise ValueError(f"no index of version {index_file.VERSION}")
            batch = reader.get_batch(0)
            _check(batch, reader.schema, meta)
            self._columns = {name: batch.column(name).to_numpy(zero_copy_only=True) for name in COLUMNS}
        except (ValueError, OSError, KeyError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{path} is not an Arrow file of ours ({reason}): build the data set again"
            ) from None
        self.shards: list[str] = meta["shards"]
        self.splits: dict[str, tuple[int, int]] = {name: tuple(ends) for name, ends in meta["splits"].items()}
        self._sidecar = meta["json"] == "sidecar"
        self._touched = 0

    @classmethod
    def open(cls, root: str | Path) -> "ShardIndex":
        """Opens DIR/index.arrow, and looks whether every shard is there and, of up to 5 million rows, long enough.

        Raises:
            ValueError: DIR is no data set that `python -m d2s.shard build` (or `index`) made, or a shard of it is
                missing or cut short.
        """
        root = Path(root)
        if not root.is_dir():
            raise ValueError(
                f"data is {str(root)!r}, which is no folder: make it with python -m d2s.shard build"
            )
        if not (root / manifest.NAME).is_file():
            raise ValueError(f"{root} has no {manifest.NAME}: make it with python -m d2s.shard build")
        if not (root / index_file.NAME).is_file():
            raise ValueError(
                f"{root} has no {index_file.NAME}: make it with python -m d2s.shard index {root}"
            )
        index = cls(root)
        index._check_shards()
        return index

    def _check_shards(self) -> None:
        """One look at every file that samples are read from: training would find out after hours."""
        names = [*self.shards, *([_SIDECAR] if self._sidecar else [])]
        if len(self) > _SIZED_ROWS:
            # A folder is listed at once; asking for tens of thousands of files one by one takes a shared disk long.
            held = {
                folder: _listed(self.root / folder) for folder in {os.path.dirname(name) for name in names}
            }
            sizes = [0 if os.path.basename(name) in held[os.path.dirname(name)] else None for name in names]
            ends = [0] * len(names)
        else:
            sizes = [_size(self.root / name) for name in names]
            ends = self._ends(len(names))
        for name, end, size in zip(names, ends, sizes, strict=True):
            if size is None:
                raise ValueError(
                    f"{self.root / name}: no such file, but the index names it: copy it here again"
                )
            if size < end:
                reason = f"cut short: {size:,} bytes, but its samples end at {end:,}"
                raise ValueError(
                    f"{self.root / name}: {reason}; copy it here again, or build the data set again"
                )

    def _ends(self, files: int) -> list[int]:
        """Where the last sample in each shard ends, and the last record of the sidecar behind them, in bytes."""
        ends, chunk = np.zeros(files, np.int64), 1 << 18
        for start in range(0, len(self), chunk):
            part = {name: self._columns[name][start : start + chunk] for name in _PLACE}
            shard = part["shard"]
            if shard.min() < 0 or shard.max() >= len(self.shards):
                wrong = int(np.flatnonzero((shard < 0) | (shard >= len(self.shards)))[0])
                reason = f"row {start + wrong} is in shard {shard[wrong]} of {len(self.shards)}"
                raise ValueError(
                    f"{self.root / index_file.NAME} is damaged: {reason}: build the data set again"
                )
            np.maximum.at(ends, shard, part["image_offset"] + part["image_size"])
            captions = part["json_offset"] + part["json_size"]
            np.maximum.at(
                ends, files - 1 if self._sidecar else shard, captions.max() if self._sidecar else captions
            )
        self._release(_TRIM_AFTER)
        return ends.tolist()

    def __reduce__(self) -> tuple:
        return type(self), (self.root,)

    def __len__(self) -> int:
        return len(self._columns["shard"])

    def rows(self, split: str) -> range:
        """The split's global rows.

        Raises:
            ValueError: there is no such split, or it is empty.
        """
        start, stop = self.splits.get(split, (0, 0))
        if start == stop:
            there = ", ".join(f"{name} ({b - a})" for name, (a, b) in self.splits.items() if b > a)
            raise ValueError(
                f"split {split!r} of {self.root} has no image: the data set has {there or 'nothing'}"
            )
        return range(start, stop)

    def column(self, name: str) -> NDArray:
        """A whole column, (rows,), as a view of the mapped file. Indexing it with an array copies; slices do not."""
        return self._columns[name]

    def take(self, name: str, rows: I64) -> NDArray:
        """A column's values at some rows: (k,) from int64 (k,). Keeps the resident memory of the mapping small."""
        values = self._columns[name][rows]
        self._release(len(values))
        return values

    def total(self, split: str, kind: str) -> int:
        """Number of captions of a kind ("sparse" or "dense") in a split."""
        rows = self.rows(split)
        starts, counts = self._columns[f"{kind}_start"], self._columns[f"n_{kind}"]
        return int(starts[rows[-1]]) + int(counts[rows[-1]]) - int(starts[rows[0]])

    def n_sparse_total(self, split: str) -> int:
        """Number of (image, sparse caption) pairs in a split."""
        return self.total(split, "sparse")

    def pair(self, split: str, indices: I64, kind: str = "sparse") -> tuple[I64, I64]:
        """The image and the caption of pairs that are numbered 0..total-1 within a split.

        Args:
            indices: int64 (k,).
        Returns:
            Global rows (k,) and the captions' numbers within their images (k,), both int64.
        """
        rows = self.rows(split)
        starts = self._columns[f"{kind}_start"][rows.start : rows.stop]
        wanted = np.asarray(indices, np.int64) + starts[0]
        local = np.searchsorted(starts, wanted, side="right") - 1
        numbers = wanted - starts[local]
        counts = self._columns[f"n_{kind}"][rows.start : rows.stop][local]
        if ((numbers < 0) | (numbers >= counts)).any():
            reason = f"its {kind} captions are not numbered one after the other"
            raise ValueError(f"{self.root / index_file.NAME} is damaged: {reason}: build the data set again")
        self._release(len(local) * 17)
        return local + rows.start, numbers

    def without(self, split: str, kind: str) -> tuple[int, int]:
        """How many images of a split have no caption of a kind, and the first such row (-1 if none)."""
        rows, chunk, count, first = self.rows(split), 1 << 22, 0, -1
        for start in range(rows.start, rows.stop, chunk):
            none = np.flatnonzero(self._columns[f"n_{kind}"][start : min(start + chunk, rows.stop)] == 0)
            if none.size and first < 0:
                first = start + int(none[0])
            count += none.size
            self._release(_TRIM_AFTER)
        return count, first

    def shard_sizes(self, split: str, unit: str = "rows") -> I64:
        """Items in each of the split's shards, in row order: images ("rows") or captions ("sparse", "dense")."""
        rows = self.rows(split)
        shards = self._columns["shard"][rows.start : rows.stop]
        # Shards are numbered in row order, so their borders are found by bisection, not by reading the column.
        numbers = np.arange(shards[0], shards[-1] + 2, dtype=shards.dtype)
        borders = np.searchsorted(shards, numbers) + rows.start
        if unit != "rows":
            starts = self._columns[f"{unit}_start"]
            inner = starts[borders[:-1]]
            borders = np.append(inner, starts[rows.start] + self.total(split, unit))
        self._release(_TRIM_AFTER)
        return np.diff(borders)

    def location(self, row: int) -> Location:
        """Where a row's members lie. Raises DamagedSample if the index names no shard for it."""
        value = {name: int(self._columns[name][row]) for name in _PLACE}
        self._release(len(_PLACE))
        number = value.pop("shard")
        if not 0 <= number < len(self.shards):
            raise DamagedSample(index_file.NAME, f"row {row}", f"is in shard {number} of {len(self.shards)}")
        shard = self.shards[number]
        return Location(shard=shard, json_file=_SIDECAR if self._sidecar else shard, **value)

    def keys(self, rows: Sequence[int]) -> list[str]:
        """Keys of some rows, looked up in the manifest (slow: it reads a row group for each).

        Raises:
            ValueError: the manifest cannot be read.
        """
        try:
            with pq.ParquetFile(self.root / manifest.NAME) as file:
                sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
                starts = np.cumsum(sizes) - sizes
                return [_key(file, starts, int(row)) for row in rows]
        except (OSError, pa.ArrowInvalid, pa.ArrowKeyError) as error:
            raise ValueError(f"{self.root / manifest.NAME} cannot be read: {error}") from None

    def fingerprint(self) -> str:
        """A short name of what the index holds (rows, splits, shards): to notice that a run's data were replaced."""
        text = json.dumps([len(self), self.splits, self.shards], sort_keys=True)
        return f"{draws.name(text):016x}"

    def _release(self, touched: int) -> None:
        self._touched += touched
        if self._touched >= _TRIM_AFTER and hasattr(mmap, "MADV_DONTNEED"):
            # The pages stay in the machine's page cache; only this process's claim on them ends.
            self._map.madvise(mmap.MADV_DONTNEED)
            self._touched = 0


def _check(batch: pa.RecordBatch, form: pa.Schema, meta: dict) -> None:
    """Raises ValueError, KeyError or an Arrow error where columns or metadata are not as they were written."""
    batch.validate()
    wanted = index_file.index_schema([], {})
    if not form.equals(wanted) or any(batch.column(name).null_count for name in COLUMNS):
        raise ValueError("other columns than an index has")
    shards, splits = meta["shards"], meta["splits"]
    if not isinstance(shards, list) or not all(isinstance(name, str) and "\0" not in name for name in shards):
        raise ValueError("its list of shards is damaged")
    if not isinstance(splits, dict) or meta["json"] not in ("tar", "sidecar"):
        raise ValueError("its list of splits is damaged")
    for name, ends in splits.items():
        whole = isinstance(ends, list) and len(ends) == 2 and all(type(end) is int for end in ends)
        if not whole or not 0 <= ends[0] <= ends[1] <= batch.num_rows:
            raise ValueError(f"split {name!r} has rows {ends} of {batch.num_rows}")


def _listed(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except OSError:
        return set()


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


def _key(file: pq.ParquetFile, starts: I64, row: int) -> str:
    group = int(np.searchsorted(starts, row, side="right")) - 1
    return file.read_row_group(group, columns=["key"]).column("key")[row - int(starts[group])].as_py()
