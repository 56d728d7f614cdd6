"""The layout of the authors' release: a folder in which line n of one file belongs to line n of another.

`<split>_ids.txt` has an image id a line, `<split>_caps.txt` the captions (the same number for each image, in
the order of the ids), `id_mapping.json` the path of each id, and `<data set>_<split>.jsonl` one dense caption
an image. Because position is all that ties them together, a line too few or too many is an error, always.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from d2s.common.files import parse_json, read_json
from d2s.shards.build.dense import texts
from d2s.shards.format.sample import Entry, Faults, SourceOptions, split_rank
from d2s.shards.sources.flickr import read_lines

NEEDS = ("captions", "images")
_SPLITS = {"testall": "test", "dev": "val"}


def entries(options: SourceOptions, faults: Faults) -> Iterator[Entry]:
    """Reads every split that has ids in the folder; `dev` is val, `testall` (the whole of COCO's) is test."""
    folder = options.caption_file
    if not folder.is_dir():
        raise ValueError(f"--captions {folder}: not a folder; the release keeps its *_ids.txt files in one")
    names = {path.name.removesuffix("_ids.txt") for path in folder.glob("*_ids.txt")}
    if not names:
        raise ValueError(f"{folder}: no *_ids.txt in it")
    if {"test", "testall"} <= names:
        print(f"{folder}: test is part of testall; taking testall", file=sys.stderr)
        names.discard("test")
    mapping = read_json(folder / "id_mapping.json")
    if not isinstance(mapping, dict):
        raise ValueError(f"{folder / 'id_mapping.json'}: not a JSON object of id: path")
    for name in sorted(names, key=lambda name: split_rank(_SPLITS.get(name, name))):
        yield from _split(folder, name, mapping, options, faults)


def _split(folder: Path, name: str, mapping: dict, options: SourceOptions, faults: Faults) -> Iterator[Entry]:
    ids_path, captions_path = folder / f"{name}_ids.txt", folder / f"{name}_caps.txt"
    ids, captions = read_lines(ids_path), read_lines(captions_path)
    if not ids:
        raise ValueError(f"{ids_path}: split {_SPLITS.get(name, name)!r} is empty: the file has no line")
    if len(captions) % len(ids):
        raise ValueError(
            f"{captions_path}: {len(captions):,} lines do not align with {len(ids):,} ids in {ids_path.name}"
        )
    each = len(captions) // len(ids)
    dense_path, dense = _dense(folder, name, len(ids))
    for number, line in enumerate(ids):
        where = f"{ids_path}: line {number + 1}"
        if not re.fullmatch(r"-?[0-9]{1,19}", line.strip()) or line.strip() not in mapping:
            faults.add(where, f"id {line.strip()!r} is not in id_mapping.json", line.strip())
            continue
        long: tuple = ()
        if dense_path is not None:
            try:
                long = _texts(dense[number], options.dense_columns)
            except ValueError as error:
                faults.add(
                    f"{dense_path}: line {number + 1}",
                    f"not a JSON object with a text: {error}",
                    line.strip(),
                )
                continue
        path = str(mapping[line.strip()])
        yield Entry(
            split=_SPLITS.get(name, name),
            source_id=path,
            where=f"{captions_path}: line {number * each + 1}",
            sparse=tuple(captions[number * each : (number + 1) * each]),
            dense=long,
            image_id=int(line),
            path=str(options.images / path),
        )


def _texts(line: str, columns: tuple[str, ...]) -> tuple:
    value = parse_json(line)
    if not isinstance(value, dict):
        raise ValueError(f"it is {type(value).__name__}")
    for name in columns:
        if name not in value:
            raise ValueError(f"no field {name!r}")
    found = texts(value, columns)
    if columns and not found:
        raise ValueError(f"no caption in {', '.join(columns)}")
    return found


def _dense(folder: Path, name: str, images: int) -> tuple[Path | None, list[str]]:
    """The aligned dense captions of a split, if the folder has them (the release has them for train alone)."""
    found = sorted({*folder.glob(f"*_{name}.jsonl"), *folder.glob(f"{name}.jsonl")})
    if not found:
        return None, []
    if len(found) > 1:
        raise ValueError(
            f"{folder}: {found[0].name} and {found[1].name} both fit split {name!r}; keep one of them"
        )
    lines = read_lines(found[0])
    if len(lines) != images:
        raise ValueError(
            f"{found[0]}: {len(lines):,} lines do not align with {images:,} ids in {name}_ids.txt"
        )
    return found[0], lines
