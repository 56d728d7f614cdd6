"""index.arrow: the fixed-width columns of the manifest in one Arrow record batch, made to be memory-mapped.

Every process that opens it shares the same pages, and a column is a numpy view without a copy: hundreds of
millions of rows open in no time.
"""

import json
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from d2s.common.files import atomic_file
from d2s.shards.format.sample import split_rank

NAME = "index.arrow"
VERSION = 1
_COLUMNS = {
    "shard": "int32",
    "image_offset": "int64",
    "image_size": "int32",
    "json_offset": "int64",
    "json_size": "int32",
    "crc32": "uint32",
    "image_id": "int64",
    "n_sparse": "int32",
    "n_dense": "int32",
    "sparse_start": "int64",
    "dense_start": "int64",
}


def index_schema(shards: list[str], splits: dict[str, list[int]], json_home: str = "tar") -> pa.Schema:
    """Columns of the index, with the shard names and the row range of every split in its metadata."""
    assert json_home in ("tar", "sidecar")
    meta = {"version": VERSION, "shards": shards, "splits": splits, "json": json_home}
    fields = [(name, pa.from_numpy_dtype(kind)) for name, kind in _COLUMNS.items()]
    return pa.schema(fields, metadata={"d2s": json.dumps(meta, separators=(",", ":"))})


class IndexWriter:
    """Collects the rows of one shard after another in files, so that memory does not grow with the rows."""

    def __init__(self, rows: int, scratch: Path) -> None:
        self._columns = {
            name: np.memmap(scratch / f"{name}.column", kind, "w+", shape=(rows,))
            if rows
            else np.empty(0, kind)
            for name, kind in _COLUMNS.items()
        }
        self._rows = rows
        self._next = self._sparse = self._dense = 0
        self._shards: list[str] = []
        self._splits: dict[str, list[int]] = {}

    def add(self, table: pa.Table, crc32: np.ndarray) -> None:
        """Appends manifest rows of one shard and the checksum of each (over image bytes, then JSON bytes)."""
        if not table.num_rows:
            return
        shard, split = table.column("shard")[0].as_py(), table.column("split")[0].as_py()
        start, stop = self._next, self._next + table.num_rows
        if not self._shards or self._shards[-1] != shard:
            self._shards.append(shard)
        self._splits.setdefault(split, [start, stop])[1] = stop
        for name in ("image_offset", "image_size", "json_offset", "json_size", "image_id"):
            self._columns[name][start:stop] = table.column(name).to_numpy()
        self._columns["shard"][start:stop] = len(self._shards) - 1
        self._columns["crc32"][start:stop] = crc32
        self._sparse = self._captions(table, "sparse", self._sparse, start, stop)
        self._dense = self._captions(table, "dense", self._dense, start, stop)
        self._next = stop

    def _captions(self, table: pa.Table, kind: str, total: int, start: int, stop: int) -> int:
        counts = np.concatenate([chunk.value_lengths().to_numpy() for chunk in table.column(kind).chunks])
        ends = total + np.cumsum(counts, dtype=np.int64)
        self._columns[f"n_{kind}"][start:stop] = counts
        self._columns[f"{kind}_start"][start:stop] = ends - counts
        return int(ends[-1])

    def finish(self, folder: Path, json_home: str = "tar") -> None:
        """Writes index.arrow, whole or not at all."""
        assert self._next == self._rows, f"{self._next} rows came, {self._rows} were announced"
        assert list(self._splits) == sorted(self._splits, key=split_rank), "splits come in their order"
        form = index_schema(self._shards, self._splits, json_home)
        batch = pa.record_batch([pa.array(column) for column in self._columns.values()], schema=form)
        with atomic_file(folder / NAME) as file, pa.ipc.new_file(file, form) as writer:
            writer.write_batch(batch)


def write_index(folder: Path, table: pa.Table, crc32: np.ndarray, json_home: str = "tar") -> None:
    """Writes index.arrow for a manifest table whose rows stand in manifest order."""
    shards = table.column("shard").to_pylist()
    cuts = [0, *(i for i in range(1, len(shards)) if shards[i] != shards[i - 1]), len(shards)]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        writer = IndexWriter(table.num_rows, Path(scratch))
        for start, stop in pairwise(cuts):
            writer.add(table.slice(start, stop - start), crc32[start:stop])
        writer.finish(Path(folder), json_home)
