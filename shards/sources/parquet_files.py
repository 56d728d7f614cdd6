"""Reads rows of parquet files, a few at a time, so that files with images need little memory."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from d2s.shards.sources.faults import no_column

_ROWS, _ROWS_OF_IMAGES = 8192, 32


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not readable as parquet: {str(error).splitlines()[0]}") from None


def column_names(path: Path) -> list[str]:
    """Returns the column names of a file."""
    with _opened(path) as file:
        return file.schema_arrow.names


def rows(
    path: Path, columns: Mapping[str, str] | None, only: Sequence[str] | None
) -> Iterator[tuple[str, dict]]:
    """Yields ("file: row 3", row), counted from 0. columns, only: as in `caption_files.read_rows`."""
    with _opened(path) as file:
        schema = file.schema_arrow
        for name, option in (columns or {}).items():
            if name not in schema.names:
                raise ValueError(f"{path}: {no_column(name, schema.names, option)}")
        if columns is None:
            taken = [name for name in schema.names if only is None or name in only]
        else:
            taken = list(columns)
        size = _ROWS_OF_IMAGES if any(_holds_bytes(schema.field(name).type) for name in taken) else _ROWS
        number = 0
        for batch in file.iter_batches(batch_size=size, columns=taken, use_threads=False):
            for row in batch.to_pylist():
                yield f"{path}: row {number}", row
                number += 1


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_nested(kind):
        return any(_holds_bytes(kind.field(number).type) for number in range(kind.num_fields))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
