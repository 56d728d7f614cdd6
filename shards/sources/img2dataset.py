"""Reads tars of webdataset or img2dataset. A sample is an image, a caption (`.txt`) and facts (`.json`)."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

from d2s.common.messages import shorten
from d2s.common.process_map import map_ordered
from d2s.shards.format.compressed import compression, decompress
from d2s.shards.format.image_file import IMAGE_SUFFIXES
from d2s.shards.format.tar import CutShort, Member, scan
from d2s.shards.format.tar_samples import Group, Suffixes, group, member_json, member_text
from d2s.shards.sources.entry import Entry, SourceOptions
from d2s.shards.sources.faults import Faults

NEEDS = ("images",)
USES = ("split", "columns", "suffixes")
_ENDS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_DOTS = " (a key ends at the first dot of a name: rename members of several samples)"
_COLUMNS = ("sparse", "dense")


def entries(options: SourceOptions, faults: Faults) -> Iterator[Entry]:
    """Yields an entry for each sample in DIR/*.tar and DIR/<split>/*.tar, in the order of the tars' names.

    `options.suffixes` selects the text members that contain captions; `options.columns` selects fields of the
    JSON instead. Images are not read. Compressed tars are unpacked into `options.scratch`.
    """
    for name in options.columns:
        if name not in _COLUMNS:
            raise ValueError(f"--columns: {shorten(repr(name))} is none of {', '.join(_COLUMNS)}")
    Suffixes.of(options.suffixes)  # raises ValueError for an unknown role
    tars = find_tars(options.images, options.split)
    there_is_one = False
    for _, (found, rows) in map_ordered(
        partial(_read_tar, options, faults.quarantine), tars, options.workers
    ):
        faults.rows.extend(rows)
        there_is_one = there_is_one or bool(found)
        yield from found
    if not there_is_one and not faults.rows:
        raise ValueError(f"{options.images}: no sample in any of its tars ({len(tars)}); nothing to build")


def find_tars(folder: Path, split: str) -> list[tuple[str, Path]]:
    """Returns (split, path) of each tar; for a tar in a subfolder, the subfolder's name replaces `split`."""

    def tars(pattern: str) -> list[Path]:
        # macOS creates a hidden `._` file beside each file.
        found = {p for p in folder.glob(pattern) if p.name.endswith(_ENDS) and p.name[0] != "."}
        # A compressed tar is skipped if the unpacked tar lies beside it.
        return sorted(p for p in found if p.suffix == ".tar" or p.with_name(f"{_stem(p)}.tar") not in found)

    found = [(split, path) for path in tars("*")] + [(path.parent.name, path) for path in tars("*/*")]
    if not found:
        upper = next((p.name for p in folder.glob("*") if p.name.lower().endswith(_ENDS)), "")
        raise ValueError(f"{folder}: no .tar in it{f'; {upper}: write .tar in lower case' if upper else ''}")
    return found


def _stem(path: Path) -> str:
    return path.name.removesuffix(next(end for end in _ENDS if path.name.endswith(end)))


def _read_tar(
    options: SourceOptions, quarantine: bool, tar: tuple[str, Path]
) -> tuple[list[Entry], list[dict]]:
    """Returns the entries and the faults of a tar. tar: (split, path), as `find_tars` returns it."""
    split, path = tar
    faults = Faults(quarantine)
    # Several tars may use the same key, so a sample's `source_id` includes the name of its tar.
    home = path.relative_to(options.images).with_name(_stem(path)).as_posix()
    plain = _plain_tar(options, path, home, faults)
    suffixes = Suffixes.of(options.suffixes)
    found: dict[str, Entry] = {}
    if plain is None:
        return [], faults.rows
    try:
        members = ((member.name, member, member.fault) for member in scan(plain))
        with open(plain, "rb") as file:
            for sample in group(members):
                if sample.apart:
                    found.pop(sample.key, None)
                entry = _entry(file, sample, suffixes, options.columns, f"{path}: {sample.key}", faults)
                if entry is not None:
                    name = f"{home}/{entry.filename}"
                    found[sample.key] = replace(entry, split=split, path=str(plain), source_id=name)
    except CutShort as error:
        remedy = "" if quarantine else "; copy it again, or --on-error quarantine takes what is whole in it"
        faults.add(str(path), f"{error}{remedy}")
    return list(found.values()), faults.rows


def _plain_tar(options: SourceOptions, path: Path, home: str, faults: Faults) -> Path | None:
    """Returns `path`, or the path of an unpacked copy if the tar is compressed. None if that fails."""
    try:
        kind = compression(path)
    except OSError as error:
        faults.add(str(path), error.strerror or str(error))
        return None
    if not kind:
        return path
    if options.scratch is None:
        faults.add(str(path), f"is compressed ({kind}): unpack it to a plain .tar, or copy it with `build`")
        return None
    target = options.scratch / f"{home}.tar"
    if fault := decompress(path, kind, target):
        faults.add(str(path), fault)
    return target


def _entry(
    file: BinaryIO,
    sample: Group[Member],
    suffixes: Suffixes,
    columns: dict[str, str],
    where: str,
    faults: Faults,
) -> Entry | None:
    """Returns the entry of a sample, or None for a fault. The caller fills in split, path and `source_id`."""
    try:
        if sample.faults:
            raise ValueError(sample.faults[0])
        image = sample.image(suffixes)
    except ValueError as error:
        faults.add(where, f"{error}{_remedy(sample)}", sample.key)
        return None
    kinds = (suffixes.caption, suffixes.dense, suffixes.json)
    texts = {kind: _read(file, sample.members[kind]) for kind in kinds if kind in sample.members}
    try:
        sparse, dense, sha256, facts = _captions(texts, suffixes, columns)
    except ValueError as error:
        faults.add(where, f"its captions cannot be used: {error}", sample.key)
        return None
    return Entry(
        split="",
        source_id="",
        where=where,
        sparse=sparse,
        dense=dense,
        key=sample.key,
        offset=image.offset,
        size=image.size,
        sha256=sha256,
        filename=image.name,
        hint="" if sparse or dense else _hint(sample, facts),
    )


def _captions(
    texts: dict[str, bytes], suffixes: Suffixes, columns: dict[str, str]
) -> tuple[tuple, tuple, str, dict]:
    """Returns (sparse captions, dense captions, sha256 of the downloaded image, parsed JSON).

    Captions come from the fields in `columns`, else from `sparse` and `dense` in the JSON (in shards of D2S),
    else from the text members, else from `caption` in the JSON. Empty strings are skipped. Raises ValueError.
    """
    facts = member_json(texts.get(suffixes.json, b"{}"))
    fields = {kind: names.split(",") for kind, names in columns.items()}
    missing = next((name for names in fields.values() for name in names if name not in facts), None)
    if missing is not None:
        raise ValueError(f"no field {shorten(repr(missing))} in the JSON; there are {_names(facts)}")
    own = not columns and ("sparse" in facts or "dense" in facts)
    members = (
        {}
        if own
        else {kind: member_text(data, kind) for kind, data in texts.items() if kind != suffixes.json}
    )
    found = facts | {"caption": members.get(suffixes.caption, facts.get("caption"))}
    sparse = _texts(found, fields.get("sparse", ["sparse" if own else "caption"]))
    dense = _texts(found, fields.get("dense", ["dense"] if own else []))
    if "dense" not in columns and suffixes.dense in members:
        dense = _texts(members, [suffixes.dense])
    # In shards of D2S, sha256 is that of the stored image. Captions for the original would not match it.
    return sparse, dense, "" if own else str(facts.get("sha256") or ""), facts


def _texts(facts: dict, names: list[str]) -> tuple[str, ...]:
    """Returns the captions in fields `names`. ValueError unless each is null, a string or list of strings."""
    found: list[str] = []
    for name in names:
        value = facts.get(name)
        if value is None or isinstance(value, str):
            found += [value] if value and value.strip() else []
        elif isinstance(value, list) and all(isinstance(text, str) for text in value):
            found += value
        else:
            what = f"{shorten(repr(name))} is neither a text nor a list of texts"
            raise ValueError(f"{what}: {str(value)[:60]!r}")
    return tuple(found)


def _read(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)


def _names(names: Iterable[str]) -> str:
    return shorten(", ".join(names), 100)


def _remedy(sample: Group[Member]) -> str:
    """Returns the end of an error message: the --suffixes to use if the image is unclear, else ""."""
    images = [suffix for suffix in sample.members if suffix.rpartition(".")[2] in IMAGE_SUFFIXES]
    if sample.faults:
        return ""
    if not images:
        nested = next((suffix for suffix in sample.members if f".{suffix}".endswith(_ENDS)), "")
        return f"; {sample.key}.{nested} is a tar inside of the tar: unpack it" if nested else ""
    dots = len({suffix.rpartition(".")[0] for suffix in images}) > 1
    roles = {"image": images[0]}
    if len(images) == 1:
        for suffix in sample.members:
            role = {"txt": "caption", "json": "json"}.get(suffix.rpartition(".")[2])
            if role:
                roles.setdefault(role, suffix)
    given = ",".join(f"{role}={suffix}" for role, suffix in roles.items())
    return f"; --suffixes {shorten(given, 100)} says which to take{_DOTS if dots else ''}"


def _hint(sample: Group[Member], facts: dict) -> str:
    """Returns `Entry.hint` for a sample without captions: which option may select a caption, or ""."""
    if facts:
        words = {
            name: value[0] if isinstance(value, list) and value else value for name, value in facts.items()
        }
        # A caption has several words; a name or a checksum has one.
        texts = [name for name, value in words.items() if isinstance(value, str) and " " in value.strip()]
        column = max(texts, key=lambda name: len(words[name]), default="FIELD")
        return f"; its JSON has {_names(facts)}: --columns sparse={shorten(column, 50)} takes one"
    others = [suffix for suffix in sample.members if suffix.rpartition(".")[2] not in IMAGE_SUFFIXES]
    if not others:
        return ""
    there = _names(f".{suffix}" for suffix in others)
    best = next((suffix for suffix in others if "cap" in suffix or "txt" in suffix), others[0])
    return f"; beside the image there is {there}: --suffixes caption={shorten(best, 50)} takes one"
