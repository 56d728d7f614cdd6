"""Reads rows of CSV and TSV files, with or without header, separated by comma, tab, | or semicolon."""

import csv
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from d2s.common.messages import shorten
from d2s.shards.sources.faults import Faults, no_column
from d2s.shards.sources.text_files import not_utf8, open_text, plain_name

_SEPARATORS = ",\t|;"
# Header of Kaggle's results.csv for Flickr30K. One row of that file lacks the | after its number.
_KAGGLE = ["image_name", "comment_number", "comment"]
_IMAGE = re.compile(
    r"""(?:^|[,\t|;])"?[^"',\t|;]+\.(?:jpe?g|png|webp|gif|bmp|tiff?)"?[,\t|;]""", re.IGNORECASE
)
# No caption is this long. So a quote that is never closed raises csv.Error after at most 1 MiB.
csv.field_size_limit(1 << 20)


def separator(line: str) -> str:
    """Returns the first separator in a line, ignoring a quoted first field; "" if there is no separator."""
    line = re.sub(r'^"[^"]*"', "", line)
    return next((character for character in line if character in _SEPARATORS), "")


def column_names(path: Path, named: Sequence[str]) -> list[str]:
    """Returns the names in the header; or "1", "2", ... if the user named columns by number."""
    return _header(path, named)[0]


def _header(path: Path, named: Sequence[str]) -> tuple[list[str], bool]:
    """Returns the column names, and whether the first line of the file is a header."""
    first = next(_records(path), (0, [], []))[2]
    if named and all(name.isdigit() for name in named) and not set(named) <= set(first):
        return [str(number) for number in range(1, len(first) + 1)], False
    return first, True


def rows(
    path: Path, columns: Mapping[str, str] | None, faults: Faults, named: Sequence[str]
) -> Iterator[tuple[str, dict]]:
    """Yields ("file: line 3", row). A row maps column names to strings. ValueError for a bad header."""
    names, in_file = _header(path, named)
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{path}: line 1: two columns are named {shorten(repeated[0])!r}; rename one")
    for name, option in (columns or {}).items():
        if name not in names:
            raise ValueError(f"{path}: {no_column(name, names, option)}")
    records = _records(path)
    if in_file:
        next(records, None)
    for number, lines, fields in records:
        where = f"{path}: line {number}"
        if names == _KAGGLE and len(fields) == 2 and (match := re.match(r"(\d+)\s+(.+)", fields[1])):
            print(f"{where}: no bar behind the number {match[1]}; read as if it were there", file=sys.stderr)
            fields = [fields[0], match[1], match[2]]
        if swallowed := next((line for line in lines[1:] if _IMAGE.search(line)), None):
            text = shorten(swallowed.strip(), 80)
            faults.add(where, f"a quote begins here and ends behind a line that looks like a row: {text!r}")
        elif len(fields) != len(names):
            counts = f"{len(fields)} fields, but {len(names)} columns ({shorten(', '.join(names))})"
            faults.add(where, f"{counts}; a separator inside of a field needs quotes around the field")
        else:
            yield where, dict(zip(names, fields, strict=True))


def _records(path: Path) -> Iterator[tuple[int, list[str], list[str]]]:
    """Yields (number of the first line, lines, fields) for each record. Skips blank records."""
    lines: list[str] = []
    number = 0
    try:
        with open_text(path) as file:
            first = file.readline()
            split = "\t" if plain_name(path).lower().endswith(".tsv") else separator(first) or ","
            at_header = True
            if excel := re.fullmatch(r'"?sep=([,\t|;])"?\s*', first):
                # Excel's own first line; the header follows.
                number, split, first = 1, excel[1], file.readline()
            # Files that use | as separator have no quotes, and have spaces around the fields.
            quoting = csv.QUOTE_NONE if split == "|" else csv.QUOTE_MINIMAL

            source = (lines.append(line) or line for line in chain((first,), file))
            for record in csv.reader(source, delimiter=split, quoting=quoting):
                if quoting == csv.QUOTE_MINIMAL and any('"' in line for line in lines):
                    record = _with_quotes_of_words("".join(lines), split, record)
                fields = [field.strip() for field in record] if split == "|" or at_header else record
                if any(fields):
                    yield number + 1, lines.copy(), fields
                    at_header = False
                number += len(lines)
                lines.clear()
    except csv.Error as error:
        reason = str(error)
        if "new-line character" in reason:
            reason = "a carriage return alone ends a line here; save it with line ends of Unix or Windows"
        raise ValueError(f"{path}: line {number + 1}: not CSV: {reason}") from None
    except UnicodeDecodeError:
        raise not_utf8(path) from None


def _with_quotes_of_words(text: str, split: str, record: list[str]) -> list[str]:
    """The fields of a record, of which a field like `"Hi" she says` keeps the quotes.

    The reader of CSV drops them. Quotes around a separator, as in `"a dog, fast" .`, are those of CSV.
    """
    if not re.search(rf'(^|{split})"[^"{split}\r\n]*"[^{split}"\r\n]', text):
        return record
    field = re.compile(
        rf'"(?:[^"]|"")*"(?={split}|$)|(?P<words>"[^"{split}\r\n]*"[^{split}"][^{split}]*)|[^{split}]*'
    )
    text, fields, at = text.rstrip("\r\n"), [], 0
    while at <= len(text) and len(fields) < len(record):
        found = field.match(text, at)
        fields.append(found["words"] or record[len(fields)])
        at = found.end() + 1
    return fields if at > len(text) and len(fields) == len(record) else record
