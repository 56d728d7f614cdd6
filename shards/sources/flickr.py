"""The token file of Flickr8k and Flickr30K (`name.jpg#0<TAB>caption`), with a list of image names for each split.

Kaggle's forms of it are read as well: captions.txt (`image,caption`) and results.csv (`image_name| comment_number|
comment`).
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
    """Reads the captions, then the split lists. Without lists every image belongs to `options.split`.

    Flickr8k has captions of some images that no list names: they are left out, and their number is printed.
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
    """The captions of each image, and the number of the line where its first one stands."""
    captions: dict[str, list[str]] = {}
    line_numbers: dict[str, int] = {}
    for number, name, caption in _token_lines(path, faults):
        captions.setdefault(name, []).append(caption)
        line_numbers.setdefault(name, number)
    return captions, line_numbers


def _token_lines(path: Path, faults: Faults) -> Iterator[tuple[int, str, str]]:
    """(line number, image name, caption) of each line."""
    form = form_of(path)
    # The lines of a token file look like CSV without a header.
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
    """(place, image name) of every line that is not blank."""
    lines = enumerate(read_lines(path), 1)
    names = [(f"{path}: line {number}", line.strip()) for number, line in lines if line.strip()]
    if not names:
        raise ValueError(f"{path}: split {split!r} is empty: the list names no image")
    return names
