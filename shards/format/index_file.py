"""Writes index.arrow, which readers memory-map. It has fixed-width columns for all samples in one record batch.

All processes that open the file share its pages. Each column is a numpy view without a copy. So opening the file
is fast, even if it has hundreds of millions of rows.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from d2s.common.files import atomic_file
from d2s.shards.format.file_names import INDEX
from d2s.shards.format.keys import split_rank

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
COLUMNS = tuple(_COLUMNS)
FROM_MANIFEST = ("image_offset", "image_size", "json_offset", "json_size", "image_id")
"""The columns that are copied from the manifest."""


def index_schema(shards: list[str], splits: dict[str, list[int]], json_home: str = "tar") -> pa.Schema:
    """Returns the Arrow schema of the index. Its metadata has the shard names and the row range of each split.

    splits: maps each split to [first row, last row + 1].
    json_home: "tar" if the captions are in the shards, or "sidecar" if they are in captions.jsonl.
    """
    assert json_home in ("tar", "sidecar")
    meta = {"version": VERSION, "shards": shards, "splits": splits, "json": json_home}
    fields = [(name, pa.from_numpy_dtype(kind)) for name, kind in _COLUMNS.items()]
    return pa.schema(fields, metadata={"d2s": json.dumps(meta, separators=(",", ":"))})


class IndexWriter:
    """Collects the `rows` rows of all shards in memory-mapped files in `scratch`, so that it needs little memory."""

    def __init__(self, rows: int, scratch: Path) -> None:
        assert rows, "an index has at least one row"
        self._columns = {
            name: np.memmap(scratch / f"{name}.column", kind, "w+", shape=(rows,))
            for name, kind in _COLUMNS.items()
        }
        self._rows = rows
        self._next = 0
        self._captions = {"sparse": 0, "dense": 0}
        self._shards: list[str] = []
        self._splits: dict[str, list[int]] = {}

    def add(self, table: pa.Table, crc32: np.ndarray) -> None:
        """Appends a shard's manifest rows. crc32: CRC-32 of each sample's image and JSON, of shape (rows,)."""
        split = table.column("split")[0].as_py()
        start, stop = self._next, self._next + table.num_rows
        self._splits.setdefault(split, [start, stop])[1] = stop
        for name in FROM_MANIFEST:
            self._columns[name][start:stop] = table.column(name).to_numpy()
        self._columns["shard"][start:stop] = len(self._shards)
        self._columns["crc32"][start:stop] = crc32
        for kind, total in self._captions.items():
            counts = np.concatenate([c.value_lengths().to_numpy() for c in table.column(kind).chunks])
            ends = total + np.cumsum(counts, dtype=np.int64)
            self._columns[f"n_{kind}"][start:stop] = counts
            self._columns[f"{kind}_start"][start:stop] = ends - counts
            self._captions[kind] = int(ends[-1])
        self._shards.append(table.column("shard")[0].as_py())
        self._next = stop

    def finish(self, folder: Path, json_home: str = "tar") -> None:
        """Writes index.arrow to `folder` atomically. `index_schema` explains `json_home`."""
        assert self._next == self._rows, f"{self._next} rows came, {self._rows} were announced"
        assert list(self._splits) == sorted(self._splits, key=split_rank), "splits come in their order"
        form = index_schema(self._shards, self._splits, json_home)
        batch = pa.record_batch([pa.array(column) for column in self._columns.values()], schema=form)
        with atomic_file(folder / INDEX) as file, pa.ipc.new_file(file, form) as writer:
            writer.write_batch(batch)
