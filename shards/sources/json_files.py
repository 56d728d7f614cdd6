"""Reads rows from JSON lines, or from one JSON array, which is decoded in parts to save memory."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from d2s.common.files import parse_json
from d2s.shards.sources.faults import Faults
from d2s.shards.sources.text_files import not_utf8, open_text

_CHUNK = 1 << 20
_BETWEEN = re.compile(r"\s*(,?)\s*")


def layout_of(row: dict) -> tuple[str, str] | None:
    """Returns the names (layout, source) if `row` is a whole Karpathy or COCO file; None for a normal row."""
    images = row.get("images")
    if not isinstance(images, list) or not images or not isinstance(images[0], dict):
        return None
    if "sentences" in images[0]:
        return "Karpathy", "karpathy"
    return ("COCO", "coco") if "annotations" in row else None


def line_rows(path: Path, faults: Faults) -> Iterator[tuple[str, dict]]:
    """Yields ("file: line 3", row) from JSON lines. Lines that are not JSON objects go to `faults`."""
    try:
        with open_text(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row, reason = _parse_row(line)
                    if number == 1 and line.strip() == "{":
                        reason += "; a file of one object: --source coco and --source karpathy read theirs"
                    if number == 1 and (layout := layout_of(row)):
                        raise ValueError(
                            f"{path}: {layout[0]}'s layout, no rows: --source {layout[1]} reads it"
                        )
                    if reason:
                        faults.add(f"{path}: line {number}", reason)
                    else:
                        yield f"{path}: line {number}", row
    except UnicodeDecodeError:
        raise not_utf8(path) from None


def _parse_row(line: str) -> tuple[dict, str]:
    """Returns (the JSON object, ""); or ({}, reason) if the line is not a JSON object."""
    try:
        row = parse_json(line)
    except ValueError as error:
        comma = "; delete the comma at its end" if line.rstrip().endswith("},") else ""
        return {}, f"not JSON: {getattr(error, 'msg', error)}{comma}"
    return (row, "") if isinstance(row, dict) else ({}, f"not a JSON object but {type(row).__name__}")


def array_rows(path: Path, faults: Faults) -> Iterator[tuple[str, dict]]:
    """Yields ("file: row 3", row) from a JSON array, counted from 0. Items of other types go to `faults`.

    Raises:
        ValueError: the file is not JSON from some line on. All rows before that line have been yielded.
    """
    try:
        for number, row in enumerate(_items(path)):
            if isinstance(row, dict):
                yield f"{path}: row {number}", row
            else:
                faults.add(f"{path}: row {number}", f"not a JSON object but {type(row).__name__}")
    except UnicodeDecodeError:
        raise not_utf8(path) from None


def _items(path: Path) -> Iterator[object]:
    """Yields the items of a JSON array. Memory holds only the part of the file that is being decoded."""
    decode = json.JSONDecoder().raw_decode
    with open_text(path) as file:
        text, lines, first = file.read(_CHUNK), 1, True
        at = text.index("[") + 1
        while True:
            between = _BETWEEN.match(text, at)
            start, problem = between.end(), "Expecting value"
            if text.startswith("]", start) and between[1]:
                raise _not_json(path, lines + text.count("\n", 0, start), "a comma before the ]; delete it")
            if text.startswith("]", start) and not between[1]:
                if (text[start + 1 :] + file.read(_CHUNK)).strip():
                    raise ValueError(f"{path}: more text stands behind the end of the JSON array")
                return
            if start < len(text) and bool(between[1]) == first:
                raise _not_json(path, lines + text.count("\n", 0, start), "Expecting ',' or ']'")
            try:
                item, at = decode(text, start)
            except RecursionError:
                raise _not_json(path, lines + text.count("\n", 0, start), "nested too deeply") from None
            except json.JSONDecodeError as error:
                start, problem = error.pos, error.msg
            except ValueError as error:
                # A number of thousands of digits.
                raise _not_json(path, lines + text.count("\n", 0, start), str(error)) from None
            else:
                first = False
                yield item
                continue
            # Either the item is not JSON, or it continues in the next part of the file.
            if not (more := file.read(max(_CHUNK, len(text) - at))):
                raise _not_json(path, lines + text.count("\n", 0, start), problem)
            lines += text.count("\n", 0, at)
            text, at = text[at:] + more, 0


def _not_json(path: Path, line: int, problem: str) -> ValueError:
    return ValueError(f"{path}: line {line}: not JSON: {problem}")
