"""The measurements of `results/*.csv` that tables and plots are made from: each value is believed only if it can be.

The files are written by `d2s.kernels.bench`, but also copied between machines, merged and edited by hand.
"""

import csv
import io
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from datetime import date
from pathlib import Path

import torch

from d2s.kernels.bench.cases import CASES
from d2s.kernels.bench.providers import PROVIDERS
from d2s.kernels.bench.record import COLUMNS, Row, file_of
from d2s.kernels.bench.timing import MODES

# No time, rate or amount of memory of any device lies outside, and no logarithm or power of ten fails within.
LEAST, MOST = 1e-12, 1e12


def by_device(folder: Path) -> dict[str, list[Row]]:
    """The rows that count, by device. Raises ValueError naming the file, line, column and value that is wrong."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: is no folder")
    paths = sorted(folder.glob("*.csv"))
    if not paths:
        raise ValueError(f"{folder}: no measurement in it: it has no CSV file")
    found: dict[str, list[Row]] = defaultdict(list)
    for row in latest([row for path in paths for row in read(path)]):
        found[row.device].append(row)
    names: dict[str, str] = {}
    for device in found:
        other = names.setdefault(file_of(folder, device).stem, device)
        if other != device:
            raise ValueError(
                f"{folder}: column device: {other!r} and {device!r} would share their plots' names"
            )
    return dict(sorted(found.items()))


def latest(rows: Sequence[Row]) -> list[Row]:
    """Each measurement's last row, in the order in which they were first taken."""
    return list({row.key: row for row in rows}.values())


def read(path: Path) -> list[Row]:
    """The rows of a file, of which there must be some. Raises ValueError as by_device does."""
    records = _records(path)
    line, header = next(records, (1, COLUMNS))
    if header != COLUMNS:
        raise ValueError(f"{path}, line {line}: {_difference(header)}")
    rows = []
    for line, record in records:
        if len(record) != len(COLUMNS):
            raise ValueError(f"{path}, line {line}: {len(record)} values in {len(COLUMNS)} columns")
        rows.append(Row(**_values(f"{path}, line {line}", dict(zip(COLUMNS, record, strict=True)))))
    if not rows:
        raise ValueError(f"{path}: no measurement in it")
    return rows


def _records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The number of a record's last line and its values; empty lines are left out."""
    content = path.read_bytes()
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for record in filter(None, reader):
            yield reader.line_num, record
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from error


def _difference(header: Sequence[str]) -> str:
    missing = [name for name in COLUMNS if name not in header]
    surplus = [name for name in header if name not in COLUMNS]
    said = [f"lacks {', '.join(missing)}"] if missing else []
    said += [f"has {', '.join(map(repr, surplus))}"] if surplus else []
    return f"the columns are not those of d2s.kernels.bench: {'; '.join(said) or 'another order'}"


def _values(where: str, record: Mapping[str, str]) -> dict[str, object]:
    values = {}
    for field in fields(Row):
        text = record[field.name]
        try:
            values[field.name] = _READERS.get(field.name, _DEFAULTS.get(field.type, _text))(text)
        except ValueError as error:
            raise ValueError(f"{where}, column {field.name}: {text!r}: {error}") from error
    return values


def _text(text: str) -> str:
    # A line break or another control character would end the README's line.
    if not text.isprintable():
        raise ValueError("must be printable")
    return text


def _number(least: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = float(text)
        # Not a number fails every comparison.
        if not least <= value <= MOST:
            raise ValueError(f"must lie between {least:g} and {MOST:g}")
        return value

    return parse


def _count(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if not least <= value <= MOST:
            raise ValueError(f"must lie between {least} and {MOST:g}")
        return value

    return parse


def _one_of(known: Sequence[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in known:
            raise ValueError(f"must be one of {', '.join(known)}")
        return text

    return parse


def _device(text: str) -> str:
    # Files are named by letters and digits of the device.
    if not re.search("[a-z0-9]", _text(text).lower()):
        raise ValueError("must have a letter or a digit")
    return text


def _date(text: str) -> str:
    return date.fromisoformat(text).isoformat()


def _dtype(text: str) -> str:
    if not isinstance(getattr(torch, text, None), torch.dtype):
        raise ValueError("must be a type of torch")
    return text


def _memory(text: str) -> float | None:
    """Empty where it was not measured."""
    return _number(0)(text) if text else None


_DEFAULTS: dict[object, Callable[[str], object]] = {int: _count(1), float: _number(LEAST)}
_READERS: dict[str, Callable[[str], object]] = {
    "date": _date,
    "device": _device,
    "case": _one_of(tuple(CASES)),
    "mode": _one_of(MODES),
    "provider": _one_of(PROVIDERS),
    "dtype": _dtype,
    "tokens": _count(0),
    "extra_mib": _memory,
    "tflops": _number(0),
}
