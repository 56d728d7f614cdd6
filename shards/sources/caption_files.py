"""Reads caption files as rows. It detects the format (JSON lines, JSON array, CSV or parquet) by content."""

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from d2s.common.files import parse_json
from d2s.shards.format.image_file import GIT_LFS
from d2s.shards.sources import csv_files, json_files, parquet_files
from d2s.shards.sources.faults import Faults, no_column
from d2s.shards.sources.text_files import COMPRESSED, open_bytes, plain_name

_FORMS = {"csv": "CSV", "parquet": "parquet", "json": "a JSON array of rows", "jsonl": "JSON lines"}
_SUFFIXES = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}


def form_of(path: Path) -> str:
    """Returns the format of a file: "parquet", "csv", "json" (one array) or "jsonl". ValueError for a zip."""
    with open_bytes(path) as file:
        head = file.read(1 << 16)
    if head.startswith(GIT_LFS):
        raise ValueError(f"{path}: a pointer of Git LFS, not the file itself: `git lfs pull` fetches it")
    suffix = Path(plain_name(path)).suffix.lower()
    if suffix == ".parquet" or head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"PK\3\4"):
        raise ValueError(f"{path}: a zip archive; unpack it")
    text = head.decode("utf-8-sig", "replace").lstrip()
    if _SUFFIXES.get(suffix) == "csv":
        return "csv"
    if text[:1] in ("[", "{"):
        return "json" if text[0] == "[" else "jsonl"
    first = text.split("\n", 1)[0]
    return "jsonl" if suffix in (".json", *_SUFFIXES) or not csv_files.separator(first) else "csv"


def remedy(path: Path, value: object = None) -> str:
    """Returns the end of an error message: which --source can read the file. Returns "" if none can.

    Args:
        value: the parsed content of the file, if the caller has parsed it as JSON.
    """
    if isinstance(value, dict):
        layout = json_files.layout_of(value)
        return f"; it has {layout[0]}'s layout: --source {layout[1]} reads it" if layout else ""
    form = form_of(path)
    if form == "jsonl":
        with open_bytes(path) as file:
            head = file.read(1 << 16).decode("utf-8-sig", "replace")
        try:
            row = parse_json(head.strip().split("\n", 1)[0])
        except ValueError:
            return ""
        if not isinstance(row, dict) or "\n" not in head.strip():
            return remedy(path, row) if isinstance(row, dict) else ""
    source = {"json": "jsonl"}.get(form, form)
    return f"; it is {_FORMS[form]}: --source {source} reads it"


def list_files(path: Path) -> list[Path]:
    """Returns [path] for a file; for a folder, its caption files of one format, sorted by name.

    If the folder has metadata.jsonl, .csv or .parquet (as image folders on the Hugging Face hub do), returns
    only that file. Raises ValueError if there is no caption file.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path}: no such file")
    found = sorted(part for part in path.iterdir() if part.is_file() and not part.name.startswith("."))
    for form in ("parquet", "jsonl", "csv"):
        suffixes = tuple(suffix for suffix, name in _SUFFIXES.items() if name == form)
        names = [part for part in found if plain_name(part).lower().endswith(suffixes)]
        if metadata := [part for part in names if plain_name(part).startswith("metadata.")]:
            return metadata
        if names:
            return names
    kinds = ", ".join(("*.parquet", "*.jsonl", "*.csv", "*.tsv"))
    raise ValueError(
        f"{path}: none of {kinds} in this folder (a compressed one ends with {COMPRESSED[0]}, ...)"
    )


def column_names(path: Path, named: Sequence[str] = ()) -> list[str]:
    """Returns the column names of a file. For JSON they are the fields of its first row.

    Args:
        named: columns that the user asked for. If all are numbers, a CSV file is taken to have no header.
    """
    form = form_of(path)
    if form == "parquet":
        return parquet_files.column_names(path)
    if form == "csv":
        return csv_files.column_names(path, named)
    first = next(_json_rows(path, form, {}, Faults(quarantine=True)), None)
    return list(first[1]) if first else []


def read_rows(
    path: Path,
    columns: Mapping[str, str] | None,
    faults: Faults,
    only: Sequence[str] | None = None,
    named: Sequence[str] = (),
) -> Iterator[tuple[str, dict]]:
    """Yields (place, row). A place is "file: line 3", or "file: row 3" (from 0) for parquet and JSON arrays.

    Args:
        columns: columns that every row must have, each with the option that names it. From parquet, only these are
            read. None means any columns.
        faults: collects the rows that cannot be used.
        only: if `columns` is None, the parquet columns to read if they exist; None reads all.
        named: as in `column_names`. `columns` are added to it.
    Raises:
        ValueError: the file cannot be read or is not UTF-8, or a parquet or CSV file lacks one of `columns`.
    """
    form = form_of(path)
    if form == "parquet":
        yield from parquet_files.rows(path, columns, only)
    elif form == "csv":
        yield from csv_files.rows(path, columns, faults, (*named, *(columns or ())))
    else:
        yield from _json_rows(path, form, columns or {}, faults)


def _json_rows(
    path: Path, form: str, columns: Mapping[str, str], faults: Faults
) -> Iterator[tuple[str, dict]]:
    reader = json_files.array_rows if form == "json" else json_files.line_rows
    for where, row in reader(path, faults):
        missing = next((name for name in columns if name not in row), None)
        if missing is None:
            yield where, row
        else:
            faults.add(where, no_column(missing, sorted(row), columns[missing], "field"))


def captions_of(row: dict, columns: tuple[str, ...]) -> tuple:
    """Returns the captions in `columns` of a row, in order, without surrounding white space.

    A column may contain a string, a list of strings, such a list written as a string, or a conversation (only
    its answers are taken). Values that are not strings are returned unchanged.
    """
    found: list = []
    for name in columns:
        value = row.get(name)
        value = _list_in_text(value) if isinstance(value, str) else value
        found.extend(map(_answer, _without_questions(value)) if isinstance(value, list) else [value])
    return tuple(text.strip() if isinstance(text, str) else text for text in found)


def _list_in_text(value: str) -> str | list[str]:
    """Parses a string like `["a dog", "a cat"]` as JSON or Python does. Returns other strings unchanged."""
    text = value.strip()
    if text[:1] != "[" or text[-1:] != "]" or text[1:].lstrip()[:1] not in ('"', "'"):
        return value
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        try:
            found = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return value
        # Python joins adjacent string literals, so a missing comma would join two captions.
        if repr(found) != text:
            return value
    return found if all(isinstance(part, str) for part in found) else value


def _without_questions(value: list) -> list:
    """Returns the list without the human and system turns of a conversation. Other lists stay complete."""
    human = ("human", "user", "system")
    turns = (part if isinstance(part, dict) else {} for part in value)
    return [
        part
        for part, turn in zip(value, turns, strict=True)
        if turn.get("from", turn.get("role")) not in human
    ]


def _answer(part: object) -> object:
    """Returns the text of a model's turn ({from, value} or {role, content}), or another value unchanged."""
    if isinstance(part, dict) and part.get("from", part.get("role")) in ("gpt", "assistant"):
        return part.get("value", part.get("content"))
    return part
