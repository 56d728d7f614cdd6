"""Which members of a tar make a sample, and which of them is its image: the same for the indexer and for a stream."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from d2s.common.files import parse_json
from d2s.common.messages import shorten
from d2s.shards.format.image_file import IMAGE_SUFFIXES
from d2s.shards.format.tar import CutShort

T = TypeVar("T")
# Hidden files (macOS writes a `._` companion beside each file) and what webdataset keeps for itself.
_HIDDEN = re.compile(r"(^|/)(\.[^/]*$|__MACOSX/|__[^/]*__($|/|\.[^/]*$))")
_DOCUMENTS = ("readme", "license", "licence", "copying", "notice", "authors", "changelog", "citation")
_ROLES = ("image", "caption", "dense", "json")


@dataclass(frozen=True, kw_only=True)
class Suffixes:
    """The suffixes of the members of a sample by their role."""

    image: tuple[str, ...] = IMAGE_SUFFIXES
    caption: str = "txt"
    dense: str = ""
    json: str = "json"

    @classmethod
    def of(cls, given: Mapping[str, str]) -> "Suffixes":
        """From `--suffixes image=input.jpg,caption=output.txt`. Raises ValueError for an unknown role."""
        for role in given:
            if role not in _ROLES:
                raise ValueError(f"--suffixes: {shorten(repr(role))} is none of {', '.join(_ROLES)}")
        values = {role: suffix.lower().lstrip(".") for role, suffix in given.items()}
        return cls(**values | ({"image": (values["image"],)} if "image" in values else {}))


@dataclass
class Group(Generic[T]):
    """A sample: members of a tar that stand together and have one key. `members` has them by suffix."""

    key: str
    members: dict[str, T] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    """why its members cannot be used; a group with faults may lack members"""
    apart: bool = False
    """whether other members of this key stand elsewhere in the tar, in an earlier group"""

    def image(self, suffixes: Suffixes) -> T:
        """The one image. Raises ValueError, with what there is, if there is none or a second one."""
        found = [suffix for suffix in self.members if suffix in suffixes.image]
        if len(found) == 1:
            return self.members[found[0]]
        there = shorten(", ".join(f".{suffix}" for suffix in self.members), 150)
        if found:
            raise ValueError(f"has {len(found)} images ({there})")
        raise ValueError(f"has no image, only {there}")

    @property
    def is_document(self) -> bool:
        """Whether this is no sample but a README or a licence."""
        return self.key.rpartition("/")[2].lower() in _DOCUMENTS and not any(
            suffix in IMAGE_SUFFIXES for suffix in self.members
        )


def split_name(name: str) -> tuple[str, str]:
    """Key and suffix by the WebDataset rule: the suffix begins at the first dot of the last path component."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def member_text(data: bytes, suffix: str) -> str:
    """The text of a member. Raises ValueError if it is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} of its .{suffix} is not UTF-8 text") from None


def member_json(data: bytes) -> dict:
    """The JSON object of a member. Raises ValueError if it holds anything else."""
    try:
        found = parse_json(data)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} of the JSON is not UTF-8 text") from None
    if not isinstance(found, dict):
        raise ValueError("the JSON is not an object")
    return found


def is_hidden(name: str) -> bool:
    """Whether a member is a hidden file, or is named `__meta__` or the like."""
    may_be = name.startswith(".") or "/." in name or "__" in name
    return may_be and _HIDDEN.search(name) is not None


def group(members: Iterable[tuple[str, T, str]]) -> Iterator[Group[T]]:
    """Groups members (name, member, fault) into samples: runs of members with equal keys.

    Raises:
        CutShort: as `members` does, after the last group. That group has a fault if it is not whole: if the missing
            member belongs to it, or it lacks a suffix that the first one had.
    """
    current: Group[T] | None = None
    done: set[str] = set()
    usual: set[str] = set()
    try:
        for name, member, fault in members:
            key, suffix = split_name(name)
            # Like webdataset, without a word: these belong to no sample.
            if not fault and (not suffix or is_hidden(name)):
                continue
            if current is None or key != current.key:
                if current is not None and not current.is_document:
                    usual = usual or set(current.members)
                    done.add(current.key)
                    yield current
                current = Group(key)
                if key in done:
                    current.apart = True
                    current.faults.append("its members do not stand together; tar --sort=name packs them so")
            if fault:
                current.faults.append(fault)
            elif suffix in current.members:
                current.faults.append(f"member {shorten(repr(name))} stands there twice")
            else:
                current.members[suffix] = member
    except CutShort as error:
        if current is not None and not current.is_document:
            if split_name(error.member)[0] == current.key or usual - set(current.members):
                current.faults.append(f"its last members are missing: the tar is {error}")
            yield current
        raise
    if current is not None and not current.is_document:
        yield current
