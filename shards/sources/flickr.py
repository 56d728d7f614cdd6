"""Flickr8k's and Flickr30K's token file (`name.jpg#0<TAB>caption`) with a list of names for each split."""

import sys
from collections.abc import Iterator
from pathlib import Path

from d2s.shards.format.sample import Entry, Faults, SourceOptions

NEEDS = ("captions", "images")


def read_lines(path: Path) -> list[str]:
    """The lines of a text file without their ends. Raises ValueError naming the file if it is not UTF-8.

    Only a line feed ends a line (a carriage return before it belongs to it): captions hold form feeds and
    U+2028, which `str.splitlines` takes for ends, and every line behind would belong to another image.
    """
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start}: not UTF-8 text") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def entries(options: SourceOptions, faults: Faults) -> Iterator[Entry]:
    """Reads the captions, then the split lists. Without lists every image belongs to `options.split`.

    Flickr8k has captions of some images that no list names: they are left out, and their number is printed.
    """
    path = options.caption_file
    captions, places = _captions(path, faults)
    if not options.split_lists:
        lists = {options.split: [(f"{path}: line {places[name]}", name) for name in captions]}
    else:
        lists = {split: _names(split, file) for split, file in options.split_lists.items()}
    listed = set()
    stems = {name.rsplit(".", 1)[0]: name for name in captions}
    for split, names in lists.items():
        for where, name in names:
            name = name if name in captions else stems.get(name, name)
            if name not in captions:
                faults.add(where, f"image {name!r} has no caption in {path}", name)
                continue
            listed.add(name)
            home = str(options.images / name)
            yield Entry(split=split, source_id=name, where=where, sparse=tuple(captions[name]), path=home)
    if left := len(captions) - len(listed):
        print(
            f"{path}: {left:,} images with captions are in none of the split lists; left out", file=sys.stderr
        )


def _captions(path: Path, faults: Faults) -> tuple[dict[str, list[str]], dict[str, int]]:
    captions: dict[str, list[str]] = {}
    places: dict[str, int] = {}
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        name, tab, caption = line.partition("\t")
        if not tab:
            faults.add(f"{path}: line {number}", "no tab between image and caption")
            continue
        name = name.rsplit("#", 1)[0].strip()
        captions.setdefault(name, []).append(caption)
        places.setdefault(name, number)
    return captions, places


def _names(split: str, path: Path) -> list[tuple[str, str]]:
    lines = enumerate(read_lines(path), 1)
    names = [(f"{path}: line {number}", line.strip()) for number, line in lines if line.strip()]
    if not names:
        raise ValueError(f"{path}: split {split!r} is empty: the list names no image")
    return names
