"""Tars by img2dataset: each sample is an image, its caption (`.txt`) and its metadata (`.json`)."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from d2s.common.files import parse_json
from d2s.common.process_map import map_ordered
from d2s.shards.format.image_file import IMAGE_SUFFIXES
from d2s.shards.format.tar import Member, scan, split_name
from d2s.shards.sources.entry import Entry, SourceOptions
from d2s.shards.sources.faults import Faults

NEEDS = ("images",)
USES = ("split",)


def entries(options: SourceOptions, faults: Faults) -> Iterator[Entry]:
    """Reads the headers and captions of DIR/*.tar, or of DIR/<split>/*.tar, tar after tar by name."""
    tars = find_tars(options.images, options.split)
    scan_one = partial(_scan_tar, options.images, faults.quarantine)
    for _, (found, rows) in map_ordered(scan_one, tars, options.workers):
        faults.rows.extend(rows)
        yield from found


def find_tars(folder: Path, split: str) -> list[tuple[str, Path]]:
    """(split, path) of every tar. The split of a tar in a subfolder is the name of the subfolder."""
    direct = [(split, path) for path in sorted(folder.glob("*.tar"))]
    nested = [(path.parent.name, path) for path in sorted(folder.glob("*/*.tar"))]
    if not direct and not nested:
        raise ValueError(f"{folder}: no .tar in it")
    return direct + nested


def group_members(path: Path) -> Iterator[tuple[str, dict[str, Member]]]:
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


def _scan_tar(root: Path, quarantine: bool, tar: tuple[str, Path]) -> tuple[list[Entry], list[dict]]:
    """The entries of one tar (split, path), and its faults."""
    split, path = tar
    faults = Faults(quarantine)
    found = []
    # Tars repeat each other's keys, so the name of the tar is part of the id of a sample.
    home = path.relative_to(root).with_suffix("").as_posix()
    with open(path, "rb") as file:
        for key, group in group_members(path):
            where = f"{path}: {key}"
            image = next((member for suffix, member in group.items() if suffix in IMAGE_SUFFIXES), None)
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

    Captions come from `sparse` and `dense` in the JSON (our own shards have them), else from the `.txt`, else from
    `caption` in the JSON. An empty text means that there is no caption.
    """
    facts = parse_json(_read(file, group["json"])) if "json" in group else {}
    if not isinstance(facts, dict):
        raise ValueError("the JSON is not an object")
    if "sparse" in facts or "dense" in facts:
        # In our own shards, sha256 is that of the stored image, so captions of the original cannot be joined by it.
        return _texts(facts, "sparse"), _texts(facts, "dense"), ""
    if "txt" in group:
        facts["caption"] = _read(file, group["txt"]).decode()
    return _texts(facts, "caption"), (), str(facts.get("sha256") or "")


def _texts(facts: dict, name: str) -> tuple[str, ...]:
    """The captions in a field: null, one text, or a list of texts. Raises ValueError if it holds anything else."""
    value = facts.get(name)
    if value is None or isinstance(value, str):
        return (value,) if value and value.strip() else ()
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{name!r} is neither a text nor a list of texts: {str(value)[:60]!r}")
    return tuple(value)


def _read(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)
