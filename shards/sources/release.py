"""Reads the folder layout of the authors' release. Its files are matched by line numbers:

- `<split>_ids.txt` has an image id in each line. An id may be repeated (VSE++'s files have a line for each
  caption). The image then gets the captions of all its lines.
- `<split>_caps.txt` has k captions for each line of ids, in the same order; k is the same for all lines.
- `id_mapping.json` maps each id to the path of its image.
- `<data set>_<split>.jsonl` (optional) has a dense caption for each image, in the order of their first ids.

Since only line numbers link the files, a missing or surplus line is always an error.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from d2s.common.files import parse_json
from d2s.shards.format.keys import split_rank
from d2s.shards.sources.caption_files import captions_of
from d2s.shards.sources.coco_names import find_image
from d2s.shards.sources.entry import Entry, SourceOptions
from d2s.shards.sources.faults import Faults
from d2s.shards.sources.text_files import plain_name, read_json_file, read_lines

NEEDS = ("captions", "images")
USES = ()
_SPLITS = {"testall": "test", "dev": "val"}


def entries(options: SourceOptions, faults: Faults) -> Iterator[Entry]:
    """Yields the entries of each split with an ids file. Renames `dev` to val, `testall` (COCO) to test."""
    folder = options.caption_file
    if not folder.is_dir():
        raise ValueError(f"--captions {folder}: not a folder; the release keeps its *_ids.txt files in one")
    # A plain file replaces a compressed file of the same name, because it comes later in this order.
    files = {plain_name(path): path for path in sorted(folder.iterdir(), reverse=True)}
    names = {name.removesuffix("_ids.txt") for name in files if name.endswith("_ids.txt")}
    if not names:
        raise ValueError(f"{folder}: no *_ids.txt in it")
    if {"test", "testall"} <= names:
        print(f"{folder}: test is part of testall; taking testall", file=sys.stderr)
        names.discard("test")
    mapping = read_json_file(files.get("id_mapping.json", folder / "id_mapping.json"))
    if not isinstance(mapping, dict):
        raise ValueError(f"{folder / 'id_mapping.json'}: not a JSON object of id: path")
    for name in sorted(names, key=lambda name: split_rank(_SPLITS.get(name, name))):
        yield from _entries_of_split(folder, files, name, mapping, options, faults)


def _entries_of_split(
    folder: Path, files: dict[str, Path], name: str, mapping: dict, options: SourceOptions, faults: Faults
) -> Iterator[Entry]:
    split = _SPLITS.get(name, name)
    ids_path = files[f"{name}_ids.txt"]
    captions_path = files.get(f"{name}_caps.txt", folder / f"{name}_caps.txt")
    ids, captions = [line.strip() for line in read_lines(ids_path)], read_lines(captions_path)
    if not ids:
        raise ValueError(f"{ids_path}: split {split!r} is empty: the file has no line")
    if len(captions) % len(ids):
        counts = f"{len(captions):,} lines do not align with {len(ids):,} ids"
        raise ValueError(f"{captions_path}: {counts} in {ids_path.name}")
    per_image = len(captions) // len(ids)
    places: dict[str, list[int]] = {}
    for number, image_id in enumerate(ids):
        places.setdefault(image_id, []).append(number)
    dense_path, dense_lines = _dense_lines(files, name, len(places), len(ids))
    for image, (image_id, lines) in enumerate(places.items()):
        number = lines[0]
        if not re.fullmatch(r"-?[0-9]{1,19}", image_id) or image_id not in mapping:
            faults.add(
                f"{ids_path}: line {number + 1}", f"id {image_id!r} is not in id_mapping.json", image_id
            )
            continue
        try:
            dense = _dense_captions(dense_lines[image], options.dense_columns) if dense_path else ()
        except ValueError as error:
            reason = f"not a JSON object with a text: {error}"
            faults.add(f"{dense_path}: line {image + 1}", reason, image_id)
            continue
        path = str(mapping[image_id])
        yield Entry(
            split=split,
            source_id=path,
            where=f"{captions_path}: line {number * per_image + 1}",
            sparse=tuple(captions[line * per_image + each] for line in lines for each in range(per_image)),
            dense=dense,
            image_id=int(image_id),
            path=str(find_image(options.images / path, options.images)),
        )


def _dense_captions(line: str, columns: tuple[str, ...]) -> tuple:
    value = parse_json(line)
    if not isinstance(value, dict):
        raise ValueError(f"it is {type(value).__name__}")
    for name in columns:
        if name not in value:
            raise ValueError(f"no field {name!r}")
    found = captions_of(value, columns)
    if columns and not found:
        raise ValueError(f"no caption in {', '.join(columns)}")
    return found


def _dense_lines(files: dict[str, Path], name: str, images: int, ids: int) -> tuple[Path | None, list[str]]:
    """Returns (path, lines) of a split's file of dense captions; (None, []) if there is none.

    Raises ValueError if there are two files, or if the number of lines is not `images`.
    """
    ends = (f"_{name}.jsonl", f"/{name}.jsonl")
    found = sorted(path for plain, path in files.items() if f"/{plain}".endswith(ends))
    if not found:
        return None, []
    if len(found) > 1:
        both = f"{found[0].name} and {found[1].name}"
        raise ValueError(f"{found[0].parent}: {both} both fit split {name!r}; keep one of them")
    lines = read_lines(found[0])
    if len(lines) != images:
        counts = (
            f"{len(lines):,} lines do not align with {images:,} {'ids' if images == ids else 'distinct ids'}"
        )
        raise ValueError(f"{found[0]}: {counts} in {name}_ids.txt")
    return found[0], lines
