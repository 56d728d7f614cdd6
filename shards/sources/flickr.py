"""The token file of Flickr8k and Flickr30K (`name.jpg#0<TAB>caption`), with a list of image names for each split."""

import sys
from collections.abc import Iterator
from pathlib import Path

from d2s.shards.sources.caption_files import read_lines
from d2s.shards.sources.entry import Entry, SourceOptions
from d2s.shards.sources.faults import Faults

NEEDS = ("captions", "images")
USES = ("split", "split_lists")


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
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        name, tab, caption = line.partition("\t")
        if not tab:
            faults.add(f"{path}: line {number}", "no tab between image and caption")
            continue
        name = name.rsplit("#", 1)[0].strip()
        captions.setdefault(name, []).append(caption)
        line_numbers.setdefault(name, number)
    return captions, line_numbers


def _listed_names(split: str, path: Path) -> list[tuple[str, str]]:
    """(place, image name) of every line that is not blank."""
    lines = enumerate(read_lines(path), 1)
    names = [(f"{path}: line {number}", line.strip()) for number, line in lines if line.strip()]
    if not names:
        raise ValueError(f"{path}: split {split!r} is empty: the list names no image")
    return names
