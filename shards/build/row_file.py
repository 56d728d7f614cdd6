"""Rows on disk in a memory-mapped Arrow file, so that a build of any size needs little memory."""

from bisect import bisect_right
from functools import lru_cache
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa

_BATCH = 4096


class RowFileWriter:
    """Appends dictionaries to an Arrow file; holds at most one batch of them in memory."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._schema = schema
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, schema)
        self._rows: list[dict] = []
        self.length = 0

    def append(self, row: dict) -> None:
        """Adds one row."""
        self._rows.append(row)
        self.length += 1
        if len(self._rows) == _BATCH:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_batch(pa.RecordBatch.from_pylist(self._rows, schema=self._schema))
            self._rows = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._writer.close()
        self._file.close()


class RowFile:
    """Reads rows by number, or whole columns. Processes share the pages of the file."""

    def __init__(self, path: Path) -> None:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._batch = lru_cache(maxsize=1024)(reader.get_batch)
        self._table = reader.read_all()
        self._starts = [0]
        for number in range(reader.num_record_batches):
            self._starts.append(self._starts[-1] + reader.get_batch(number).num_rows)

    def __len__(self) -> int:
        return self._starts[-1]

    def row(self, number: int) -> dict:
        """The row as a dictionary."""
        batch = bisect_right(self._starts, number) - 1
        return self._batch(batch).slice(number - self._starts[batch], 1).to_pylist()[0]

    def column(self, name: str) -> np.ndarray:
        """A column of numbers, (rows,)."""
        return self._table.column(name).to_numpy()

    def codes(self, name: str) -> tuple[np.ndarray, list[str]]:
        """A column of strings as int32 (rows,), and the strings that these numbers stand for."""
        chunks = self._table.column(name).dictionary_encode().unify_dictionaries().chunks
        return np.concatenate([chunk.indices.to_numpy() for chunk in chunks]), chunks[
            0
        ].dictionary.to_pylist()
