"""manifest.parquet: one row a sample, everything about it but the pixels."""

import json
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from d2s.common.files import atomic_file

NAME = "manifest.parquet"
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
    """The columns of the manifest. Offsets and sizes in bytes, width and height in pixels."""
    return _SCHEMA


def record(row: dict) -> bytes:
    """The JSON member of a sample: UTF-8, sorted keys, no spaces."""
    fields = ("key", "image_id", "split", "sparse", "dense", "width", "height", "sha256")
    value = {name: row[name] for name in fields}
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


def open_writer(file: object) -> pq.ParquetWriter:
    """A writer of row groups, one a shard, so that a reader can take one shard's rows alone."""
    return pq.ParquetWriter(file, _SCHEMA, compression="zstd", write_page_checksum=True)


def write_manifest(folder: Path, table: pa.Table) -> None:
    """Writes manifest.parquet, whole or not at all; one row group for each run of rows of one shard."""
    shards = table.column("shard").to_pylist()
    cuts = [0, *(i for i in range(1, len(shards)) if shards[i] != shards[i - 1]), len(shards)]
    with atomic_file(Path(folder) / NAME) as file, open_writer(file) as writer:
        for start, stop in pairwise(cuts):
            writer.write_table(table.slice(start, stop - start), row_group_size=max(1, stop - start))


def open_manifest(folder: Path) -> pq.ParquetFile:
    """Opens the manifest to be read a row group at a time.

    Raises:
        ValueError: there is none, it is damaged, or it is not one of ours.
    """
    path = Path(folder) / NAME
    if not path.is_file():
        raise ValueError(
            f"{folder}: no {NAME}; make one with `python -m d2s.shard build --out {folder} ...`"
            f" or, beside tars that exist, `python -m d2s.shard index {folder}`"
        )
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: damaged: {str(error).splitlines()[0]}") from None
    held = file.schema_arrow
    for field in _SCHEMA:
        if field.name not in held.names or held.field(field.name).type != field.type:
            file.close()
            raise ValueError(f"{path}: no manifest of ours: no column {field.name!r} of type {field.type}")
    return file


def read_manifest(folder: Path, columns: list[str] | None = None, split: str | None = None) -> pa.Table:
    """Reads the manifest, all columns or some, all splits or one; rows in their stored order.

    Raises:
        ValueError: no manifest of ours there, it is damaged, or the split has no rows.
    """
    path = Path(folder) / NAME
    open_manifest(folder).close()
    try:
        filters = None if split is None else [("split", "==", split)]
        table = pq.read_table(path, columns=columns, filters=filters)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: damaged: {str(error).splitlines()[0]}") from None
    if split is not None and not table.num_rows:
        raise ValueError(f"{folder}: split {split!r} has no rows")
    return table
