"""Tars that img2dataset wrote: an image, its caption (`.txt`) and what is known about it (`.json`) a sample."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from d2s.common.files import parse_json
from d2s.common.process_map import map_ordered
from d2s.shards.format.pictures import IMAGE_SUFFIXES
from d2s.shards.format.sample import Entry, Faults, SourceOptions
from d2s.shards.format.tar import Member, scan, split_name

NEEDS = ("images",)


def entries(options: SourceOptions, faults: Faults) -> Iterator[Entry]:
    """Reads the headers and captions of DIR/*.tar, or of DIR/<split>/*.tar, tar after tar by name."""
    tars = find_tars(options.images, options.split)
    results = map_ordered(_scan, tars, options.workers, _start, (options.images, faults.quarantine))
    for _, (found, rows) in results:
        faults.rows.extend(rows)
        yield from found


def find_tars(folder: Path, split: str) -> list[tuple[str, Path]]:
    """(split, path) of every tar, those in subfolders with the folder's name as their split."""
    direct = [(split, path) for path in sorted(folder.glob("*.tar"))]
    nested = [(path.parent.name, path) for path in sorted(folder.glob("*/*.tar"))]
    if not direct and not nested:
        raise ValueError(f"{folder}: no .tar in it")
    return direct + nested


# One scan a process at a time; set by its initializer.
_root, _quarantine = Path(), False


def _start(root: Path, quarantine: bool) -> None:
    global _root, _quarantine
    _root, _quarantine = root, quarantine


def samples(path: Path) -> Iterator[tuple[str, dict[str, Member]]]:
    """Groups the members of a tar into samples: (key, {suffix: member}) for each run of equal keys."""
    key, group = None, {}
    for member in scan(path):
        name, suffix = split_name(member.name)
        if key is not None and (name != key or suffix in group):
            yield key, group
            group = {}
        key = name
        group[suffix] = member
    if key is not None:
        yield key, group


def image_of(group: dict[str, Member]) -> Member | None:
    """The image among the members of a sample, if there is one."""
    return next((member for suffix, member in group.items() if suffix in IMAGE_SUFFIXES), None)


def _scan(task: tuple[str, Path]) -> tuple[list[Entry], list[dict]]:
    split, path = task
    faults = Faults(_quarantine)
    found = []
    # Keys need not be unique from tar to tar, so the tar's name is part of what identifies a sample.
    home = path.relative_to(_root).with_suffix("").as_posix()
    with open(path, "rb") as file:
        for key, group in samples(path):
            where = f"{path}: {key}"
            image = image_of(group)
            if image is None:
                faults.add(where, "caption without an image", key)
                continue
            try:
                sparse, dense, sha256 = _captions(file, group)
            except ValueError as error:
                faults.add(where, f"its .json or .txt cannot be used: {error}", key)
                continue
            entry = Entry(
                split=split,
                source_id=f"{home}/{image.name}",
                where=where,
                sparse=sparse,
                dense=dense,
                key=key,
                path=str(path),
                offset=image.offset,
                size=image.size,
                sha256=sha256,
                filename=image.name,
            )
            found.append(entry)
    return found, faults.rows


def _captions(file: BinaryIO, group: dict[str, Member]) -> tuple[tuple, tuple, str]:
    """Sparse and dense captions and the sha256 of the image as it was downloaded.

    A `sparse` or `dense` list in the JSON is taken (our own shards have them), else the `.txt`, else `caption`.
    An empty text stands for a source that had none: that is no caption.
    """
    facts = parse_json(_read(file, group["json"])) if "json" in group else {}
    if not isinstance(facts, dict):
        raise ValueError("the JSON is not an object")
    if "sparse" in facts or "dense" in facts:
        # The sha256 in our own records is that of the image as stored: nothing to join the original by.
        return _texts(facts, "sparse"), _texts(facts, "dense"), ""
    if "txt" in group:
        facts["caption"] = _read(file, group["txt"]).decode()
    return _texts(facts, "caption"), (), str(facts.get("sha256") or "")


def _texts(facts: dict, name: str) -> tuple[str, ...]:
    """A field that holds nothing, one text, or a list of texts. Raises ValueError if it holds anything else."""
    value = facts.get(name)
    if value is None or isinstance(value, str):
        return (value,) if value and value.strip() else ()
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{name!r} is neither a text nor a list of texts: {str(value)[:60]!r}")
    return tuple(value)


def _read(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)
