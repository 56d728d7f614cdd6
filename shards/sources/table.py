"""Reads CSV, JSON or parquet. Rows have an image or its path, captions, and optionally a split and an id."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from d2s.common.messages import shorten
from d2s.shards.format.image_file import IMAGE_SUFFIXES
from d2s.shards.sources.caption_files import captions_of, column_names, form_of, list_files, read_rows
from d2s.shards.sources.entry import Entry, SourceOptions
from d2s.shards.sources.extracted import ExtractedImages
from d2s.shards.sources.faults import Faults, caption_fault, field_fault, is_integer, text_field, whole_number
from d2s.shards.sources.image_rows import entries_of_rows

NEEDS = ("captions",)
USES = ("images", "split", "columns")
_FIELDS = ("path", "sparse", "dense", "split", "id")
_IMAGES = tuple(f".{suffix}" for suffix in IMAGE_SUFFIXES)
_ROW = '{"path": "1.jpg", "sparse": ["a dog"]}'
# Other names for our columns. They are tried only if a file has no column `path`.
_OTHER_NAMES = {
    "path": "image file_name filename filepath image_name image_path img img_path image_file file jpg".split(),
    "sparse": "caption captions text comment title sentence sentences raw".split(),
}


def entries(options: SourceOptions, faults: Faults) -> Iterator[Entry]:
    """Yields an entry for each image, with the captions of all its rows. ValueError for wrong --columns.

    Only the column `path` is required. Paths are relative to `options.images`, or else to the caption file's
    folder. In parquet, `path` may also contain the image: its bytes, or {bytes, path}. Captions are a string
    or a list of strings. If `id` is a whole number, it is the image id, else the key. Every column that
    `options.columns` names must be in every row, but its value may be null.
    """
    unknown = sorted(set(options.columns) - set(_FIELDS))
    if unknown:
        raise ValueError(f"--columns: {unknown[0]!r} is none of {', '.join(_FIELDS)}")
    for name in set(_FIELDS) - {"sparse", "dense"}:
        if "," in options.columns.get(name, ""):
            raise ValueError(f"--columns: {name!r} is given twice")
    yield from entries_of_rows(_rows(options, faults), options.scratch, faults)


def _rows(options: SourceOptions, faults: Faults) -> Iterator[dict]:
    number, there_is_one = 0, False
    for given, captions in options.captions:
        for split, file in _files(captions):
            with ExtractedImages(options.scratch, number) as images:
                split = given or options.forced_split or split or options.split
                for row in _rows_of_file(file, split, options, images, faults):
                    there_is_one = True
                    yield row
            number += 1
    if not there_is_one and not faults.rows:
        names = shorten(", ".join(str(path) for _, path in options.captions))
        raise ValueError(f"{names}: no rows in it; nothing to build")


def _files(captions: Path) -> Iterator[tuple[str, Path]]:
    """Yields (split or "", path) for each caption file. Subfolders with a metadata file are splits."""
    folders = sorted(path.parent for path in captions.glob("*/metadata.*")) if captions.is_dir() else []
    if folders and not any(captions.glob("metadata.*")):
        for folder in dict.fromkeys(folders):
            yield from ((folder.name, file) for file in list_files(folder))
    else:
        yield from (("", file) for file in list_files(captions))


def _rows_of_file(
    file: Path, split: str, options: SourceOptions, images: ExtractedImages, faults: Faults
) -> Iterator[dict]:
    """Yields, for each row of a file, a dictionary with the fields of an entry."""
    named = [name for names in options.columns.values() for name in names.split(",")]
    there = column_names(file, named)
    column = _columns(file, there, options.columns)
    form = form_of(file)
    if form in ("csv", "parquet"):
        if missing := [name for name in named if name not in there]:
            raise ValueError(f"{file}: {_no_field(missing[0], there)}")
        if column["path"][0] not in there:
            names = shorten(", ".join(there)) or "none, the file is empty"
            raise ValueError(f"{file}: no column 'path'; there are {names}: --columns path=NAME,sparse=NAME")
    captioned = any(name in there for name in (*column["sparse"], *column["dense"]))
    hint = "" if captioned else f"; there are {_names(there)}: --columns sparse=NAME"
    home = options.images or file.parent
    taken = [name for names in column.values() for name in names]
    for where, row in read_rows(file, None, faults, only=taken, named=named):
        if form == "csv":
            row = {name: text or None for name, text in row.items()}
        try:
            image = _image(row, column["path"][0], home, images)
            image_id, key = _id_field(row, column["id"][0], form == "csv")
        except KeyError as error:
            reason = f"caption without an image: {field_fault(error)}; there are {_names(row)}: --columns path=NAME"
            if row and all(name.lower().endswith(_IMAGES) for name in row):
                reason = f"maps names to captions; write rows {_ROW}"
            faults.add(where, reason)
            continue
        except TypeError as error:
            faults.add(where, field_fault(error))
            continue
        missing = [name for name in named if name not in row]
        if missing:
            faults.add(where, _no_field(missing[0], row), image["source_id"])
            continue
        yield image | {
            "split": str(row.get(column["split"][0]) or split),
            "where": where,
            "sparse": _captions(row, column["sparse"]),
            "dense": _captions(row, column["dense"]),
            "image_id": image_id,
            "key": key,
            "hint": hint,
        }


def _names(row: Sequence[str] | dict) -> str:
    return shorten(", ".join(sorted(row)))


def _no_field(name: str, row: Sequence[str] | dict) -> str:
    return f"no field {name!r}, which --columns names; there are {_names(row)}"


def _columns(file: Path, there: list[str], given: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """Maps each name in _FIELDS to column names of the file. ValueError if several _OTHER_NAMES would fit."""
    column = {name: tuple(given.get(name, name).split(",")) for name in _FIELDS}
    if "path" in there or "path" in given or not there:
        return column
    for name, others in _OTHER_NAMES.items():
        found = [other for other in others if other in there]
        if name in given or name in there or not found:
            continue
        if len(found) > 1:
            choice = f"{', '.join(found)} could all be {name!r}"
            raise ValueError(f"{file}: {choice}: choose one, as in --columns {name}={found[0]}")
        column[name] = (found[0],)
    taken = [f"{name}={column[name][0]}" for name in _OTHER_NAMES if column[name] != (name,)]
    if taken and "path" not in given:
        print(f"{file}: takes --columns {','.join(taken)}", file=sys.stderr)
    return column


def _image(row: dict, column: str, home: Path, images: ExtractedImages) -> dict:
    """Returns the fields of an entry that locate its image. Raises KeyError or TypeError for a bad field."""
    value = row[column]
    data, name = value, ""
    if isinstance(value, dict) and "bytes" in value:
        data, name = value["bytes"], value.get("path")
    elif isinstance(value, dict) and "0" in value:
        raise TypeError("pandas wrote columns; rows come of to_json(path, orient='records', lines=True)")
    if isinstance(data, bytes):
        place = images.add(data)
        # Without a name, equal bytes get equal names, so that their rows describe one image.
        name = name if isinstance(name, str) and name else f"{place['sha256'][:16]}.jpg"
        return place | {"source_id": name, "filename": name}
    path = text_field({column: name} if isinstance(value, dict) and name else row, column)
    if path.startswith(("http://", "https://")):
        raise TypeError(
            f"field {column!r} is an address; download the images with img2dataset, then --source img2dataset"
        )
    return {"source_id": path, "path": str(home / path)}


def _id_field(row: dict, column: str, in_text: bool) -> tuple[int | None, str | None]:
    """Returns (image id, key): a whole number is the id, any other string the key. Raises TypeError."""
    value = row.get(column)
    # In CSV, numbers are strings.
    if isinstance(value, float) or in_text:
        value = whole_number(value)
    if value is None or is_integer(value):
        return value, None
    if not isinstance(value, str) or caption_fault((value,)):
        raise TypeError(f"field {column!r} is {shorten(repr(value))}, neither a whole number nor a text")
    return None, value


def _captions(row: dict, columns: tuple[str, ...]) -> list:
    return list(captions_of(row, tuple(name for name in columns if row.get(name) is not None)))
