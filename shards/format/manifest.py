"""Reads and writes manifest.parquet. It has a row for each sample, with all data of the sample except the pixels."""

import json
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from d2s.common.files import atomic_file
from d2s.shards.format.file_names import MANIFEST

_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("image_id", pa.int64()),
        ("source_id", pa.string()),
        ("split", pa.string()),
        ("shard", pa.string()),
        ("image_offset", pa.int64()),
        ("image_size", pa.int64()),
        ("json_offset", pa.int64()),
        ("json_size", pa.int64()),
        ("sha256", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("sparse", pa.list_(pa.string())),
        ("dense", pa.list_(pa.string())),
    ]
)


def schema() -> pa.Schema:
    """Returns the columns of the manifest. Offsets and sizes are in bytes. Width and height are in pixels."""
    return _SCHEMA


def record(row: dict) -> bytes:
    """Returns a sample's JSON file, made from its manifest row: UTF-8 with sorted keys and no spaces."""
    fields = ("key", "image_id", "split", "sparse", "dense", "width", "height", "sha256")
    value = {name: row[name] for name in fields}
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


def open_writer(file: object) -> pq.ParquetWriter:
    """Returns a writer of the manifest. Callers write each shard's rows as one row group, which is read alone."""
    return pq.ParquetWriter(file, _SCHEMA, compression="zstd", write_page_checksum=True)


def split_by_shard(table: pa.Table) -> list[pa.Table]:
    """Splits a table into one table for each shard. The rows must be in the order of the manifest."""
    shards = table.column("shard").to_pylist()
    cuts = [0, *(i for i in range(1, len(shards)) if shards[i] != shards[i - 1]), len(shards)]
    return [table.slice(start, stop - start) for start, stop in pairwise(cuts)]


def write_manifest(folder: Path, table: pa.Table) -> None:
    """Writes `table` to manifest.parquet atomically, with one row group for each shard."""
    with atomic_file(Path(folder) / MANIFEST) as file, open_writer(file) as writer:
        for part in split_by_shard(table):
            writer.write_table(part, row_group_size=max(1, part.num_rows))


def open_manifest(folder: Path) -> pq.ParquetFile:
    """Opens the manifest without reading its rows. The caller can then read one row group at a time.

    Raises:
        ValueError: the manifest is missing or damaged, or was not written by this project.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"{folder}: no {MANIFEST}; make one with `python -m d2s.shard build --out {folder} ...`"
            f" or, beside tars that exist, `python -m d2s.shard index {folder}`"
        )
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: damaged: {str(error).splitlines()[0]}") from None
    found = file.schema_arrow
    for field in _SCHEMA:
        if field.name not in found.names or found.field(field.name).type != field.type:
            file.close()
            raise ValueError(f"{path}: no manifest of ours: no column {field.name!r} of type {field.type}")
    return file


def read_row(file: pq.ParquetFile, number: int, columns: list[str]) -> dict:
    """Returns the given columns of row `number`. This is slow, because it reads a whole row group."""
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if number < rows:
            return file.read_row_group(group, columns=columns).slice(number, 1).to_pylist()[0]
        number -= rows
    raise AssertionError("row beyond the manifest")


def read_manifest(folder: Path, columns: list[str] | None = None, split: str | None = None) -> pa.Table:
    """Reads the rows of all splits or of `split`, with all columns or `columns`. Rows keep their stored order.

    Raises:
        ValueError: as in `open_manifest`, or if the split has no rows.
    """
    open_manifest(folder).close()
    path = Path(folder) / MANIFEST
    try:
        filters = None if split is None else [("split", "==", split)]
        table = pq.read_table(path, columns=columns, filters=filters)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: damaged: {str(error).splitlines()[0]}") from None
    if split is not None and not table.num_rows:
        raise ValueError(f"{folder}: split {split!r} has no rows")
    return table
