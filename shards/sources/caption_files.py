"""Reads caption files: lines of text, and rows of JSON lines or parquet. Every row comes with its place."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from d2s.common.files import parse_json
from d2s.shards.sources.faults import Faults


def read_lines(path: Path) -> list[str]:
    """The lines of a text file without their ends. Raises ValueError naming the file if it is not UTF-8.

    Only "\\n" or "\\r\\n" ends a line. `str.splitlines` would also split at form feeds and U+2028, which captions
    contain, and all lines after them would belong to the wrong image.
    """
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start}: not UTF-8 text") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def list_files(path: Path) -> list[Path]:
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

    Args:
        columns: columns that every row must have (of parquet only these are read); None takes all there are.
        faults: receives the lines that cannot be used.
    Raises:
        ValueError: the file cannot be read, is not UTF-8, or is parquet without one of the columns.
    """
    if path.suffix == ".parquet":
        yield from _parquet_rows(path, columns)
        return
    number = 0
    try:
        # Only "\n" ends a line: a lone carriage return may stand between the parts of a JSON value.
        with open(path, encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row, reason = _parse_row(line, columns or [])
                    if reason:
                        faults.add(f"{path}: line {number}", reason)
                    else:
                        yield f"{path}: line {number}", row
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: after line {number}: not UTF-8 text") from None


def _parse_row(line: str, columns: list[str]) -> tuple[dict, str]:
    """The JSON object of a line, and "" or why it cannot be used."""
    try:
        row = parse_json(line)
    except ValueError as error:
        return {}, f"not JSON: {getattr(error, 'msg', error)}"
    if not isinstance(row, dict):
        return {}, f"not a JSON object but {type(row).__name__}"
    missing = next((name for name in columns if name not in row), None)
    return row, "" if missing is None else f"no field {missing!r}; there are {', '.join(sorted(row))}"


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
        for batch in file.iter_batches(batch_size=8192, columns=columns):
            for row in batch.to_pylist():
                yield f"{path}: row {number}", row
                number += 1


def captions_of(row: dict, columns: tuple[str, ...]) -> tuple:
    """The captions in these columns, in order and stripped. A column holds one text or a list of them."""
    found: list = []
    for name in columns:
        value = row.get(name)
        found.extend(value if isinstance(value, list) else [value])
    return tuple(text.strip() if isinstance(text, str) else text for text in found)
