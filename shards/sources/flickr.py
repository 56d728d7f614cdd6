"""Reads the token file of Flickr8k or Flickr30K (`name.jpg#0<TAB>caption`), and lists of each split's images.

It also reads Kaggle's versions of the token file: captions.txt (with the header `image,caption`) and
results.csv (with the header `image_name| comment_number| comment`).
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from d2s.common.messages import shorten
from d2s.shards.sources.caption_files import column_names, form_of, read_rows, remedy
from d2s.shards.sources.entry import Entry, SourceOptions
from d2s.shards.sources.faults import Faults
from d2s.shards.sources.text_files import read_lines

NEEDS = ("captions", "images")
USES = ("split", "split_lists")
_KAGGLE = (["image", "caption"], ["image_name", "comment_number", "comment"])


def entries(options: SourceOptions, faults: Faults) -> Iterator[Entry]:
    """Yields the entries of each split list, in order. Without lists, all images are in `options.split`.

    In Flickr8k, some images with captions are in no list. They are left out, and their number is printed.
    """
    path = options.caption_file
    captions, line_numbers = _captions(path, faults)
    if options.split_lists:
        lists = {split: _listed_names(split, file) for split, file in options.split_lists.items()}
    else:
        lists = {options.split: [(f"{path}: line {line_numbers[name]}", name) for name in captions]}
    listed = set()
    stems = {name.rsplit(".", 1)[0]: name for name in captions}
    for split, names in lists.items():
        for where, name in names:
            name = name if name in captions else stems.get(name, name)
            if name not in captions:
                faults.add(where, f"image {name!r} has no caption in {path}", name)
                continue
            listed.add(name)
            image = str(options.images / name)
            yield Entry(split=split, source_id=name, where=where, sparse=tuple(captions[name]), path=image)
    if left := len(captions) - len(listed):
        message = f"{path}: {left:,} images with captions are in none of the split lists; left out"
        print(message, file=sys.stderr)


def _captions(path: Path, faults: Faults) -> tuple[dict[str, list[str]], dict[str, int]]:
    """Maps image names, in two dictionaries, to all captions and to the line number of the first one."""
    captions: dict[str, list[str]] = {}
    line_numbers: dict[str, int] = {}
    for number, name, caption in _token_lines(path, faults):
        captions.setdefault(name, []).append(caption)
        line_numbers.setdefault(name, number)
    return captions, line_numbers


def _token_lines(path: Path, faults: Faults) -> Iterator[tuple[int, str, str]]:
    """Yields (line number, image name, caption) for each line."""
    form = form_of(path)
    # `form_of` returns "csv" for a token file too: it looks like CSV without a header.
    columns = column_names(path) if form == "csv" else []
    if columns in _KAGGLE:
        for where, row in read_rows(path, None, faults):
            yield int(where.rsplit(" ", 1)[1]), row[columns[0]], row[columns[-1]]
        return
    if form != "csv" and (other := remedy(path)):
        raise ValueError(f"{path}: no token file{other}")
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        name, tab, caption = line.partition("\t")
        if tab:
            yield number, name.rsplit("#", 1)[0].strip(), caption
        else:
            other = (
                f"; it has the columns {shorten(', '.join(columns))}: --source csv reads it"
                if number == 1
                else ""
            )
            faults.add(f"{path}: line {number}", f"no tab between image and caption{other}")


def _listed_names(split: str, path: Path) -> list[tuple[str, str]]:
    """Returns ("file: line 3", image name) for each non-blank line. Raises ValueError if there are none."""
    lines = enumerate(read_lines(path), 1)
    names = [(f"{path}: line {number}", line.strip()) for number, line in lines if line.strip()]
    if not names:
        raise ValueError(f"{path}: split {split!r} is empty: the list names no image")
    return names
