"""Reads files of rows: JSON lines, a JSON array, CSV or parquet, told apart by their content."""

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
    """What a file of rows holds: "parquet", "csv", "json" (an array) or "jsonl"."""
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
    """Where another source reads the file, the words that say so at the end of a message; "" where none does.

    Args:
        value: what the file holds, if it was read as JSON.
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
    """The file itself, or the files of rows in a folder by name, of one form. Raises ValueError if there are none.

    Of a folder with metadata.jsonl, metadata.csv or metadata.parquet (the image folders of the Hub) only that file.
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
    """The columns of a file: those of parquet, the header of CSV, the fields of the first row of JSON.

    Args:
        named: the columns that the user asked for; numbers mean that a CSV file has no header.
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
    """Yields ("file: line 3", row), or ("file: row 3", row) from parquet and JSON arrays, counted from 0.

    Args:
        columns: columns that every row must have (of parquet only these are read), each with the option that names
            it; None takes all there are.
        faults: receives the rows that cannot be used.
        only: where `columns` is None, the columns of parquet to read, as far as there are; None reads all.
        named: as in `column_names`; `columns` are always among them.
    Raises:
        ValueError: the file cannot be read, is not UTF-8, or is parquet or CSV without one of the columns.
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
    """The captions in these columns, in order and stripped.

    A column holds one text or a list of texts, which may itself be written as text; or a conversation, of which the
    answers are taken.
    """
    found: list = []
    for name in columns:
        value = row.get(name)
        value = _list_in_text(value) if isinstance(value, str) else value
        found.extend(map(_answer, _without_questions(value)) if isinstance(value, list) else [value])
    return tuple(text.strip() if isinstance(text, str) else text for text in found)


def _list_in_text(value: str) -> str | list[str]:
    """The list that a text like `["a dog", "a cat"]` writes out as JSON or Python would; any other text as it is."""
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
        # Python joins neighbouring texts, so a comma that is missing would join two captions.
        if repr(found) != text:
            return value
    return found if all(isinstance(part, str) for part in found) else value


def _without_questions(value: list) -> list:
    """The turns of a conversation that are no human's; of another list, all of it."""
    human = ("human", "user", "system")
    turns = (part if isinstance(part, dict) else {} for part in value)
    return [
        part
        for part, turn in zip(value, turns, strict=True)
        if turn.get("from", turn.get("role")) not in human
    ]


def _answer(part: object) -> object:
    """The text of a turn of a conversation ({from, value} or {role, content}); anything else as it is."""
    if isinstance(part, dict) and part.get("from", part.get("role")) in ("gpt", "assistant"):
        return part.get("value", part.get("content"))
    return part
