"""Rows on disk that many processes read at random: an Arrow file, memory-mapped, so that plans need no memory."""

from bisect import bisect_right
from functools import lru_cache
from pathlib import Path
from typing import Self

import pyarrow as pa

_BATCH = 4096


class SpoolWriter:
    """Appends dictionaries to an Arrow file; holds at most one batch of them."""

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


class Spool:
    """Reads rows by number; pages of the file are shared between processes."""

    def __init__(self, path: Path) -> None:
        self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._batch = lru_cache(maxsize=1024)(self._reader.get_batch)
        self._starts = [0]
        for number in range(self._reader.num_record_batches):
            self._starts.append(self._starts[-1] + self._reader.get_batch(number).num_rows)

    def __len__(self) -> int:
        return self._starts[-1]

    def row(self, number: int) -> dict:
        """The row as a dictionary."""
        batch = bisect_right(self._starts, number) - 1
        return self._batch(batch).slice(number - self._starts[batch], 1).to_pylist()[0]
