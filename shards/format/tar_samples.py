"""Groups the members of a tar into samples and finds each sample's image, for the builder and for streams."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from d2s.common.files import parse_json
from d2s.common.messages import shorten
from d2s.shards.format.image_file import IMAGE_SUFFIXES
from d2s.shards.format.tar import CutShort

T = TypeVar("T")
# Hidden files (macOS creates a `._` file beside each file), and names like __meta__, reserved by webdataset.
_HIDDEN = re.compile(r"(^|/)(\.[^/]*$|__MACOSX/|__[^/]*__($|/|\.[^/]*$))")
_DOCUMENTS = ("readme", "license", "licence", "copying", "notice", "authors", "changelog", "citation")
_ROLES = ("image", "caption", "dense", "json")


@dataclass(frozen=True, kw_only=True)
class Suffixes:
    """The suffixes that a sample's members have in the tar. "" means that samples have no such member."""

    image: tuple[str, ...] = IMAGE_SUFFIXES
    caption: str = "txt"
    dense: str = ""
    json: str = "json"

    @classmethod
    def of(cls, given: Mapping[str, str]) -> "Suffixes":
        """Builds suffixes from a mapping such as {"image": "input.jpg"}. ValueError for an unknown name."""
        for role in given:
            if role not in _ROLES:
                raise ValueError(f"--suffixes: {shorten(repr(role))} is none of {', '.join(_ROLES)}")
        values = {role: suffix.lower().lstrip(".") for role, suffix in given.items()}
        return cls(**values | ({"image": (values["image"],)} if "image" in values else {}))


@dataclass
class Group(Generic[T]):
    """A sample: adjacent members of a tar with the same key. `members` maps their suffixes to them."""

    key: str
    members: dict[str, T] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    """reasons why the sample cannot be used; if there are any, `members` may be incomplete"""
    apart: bool = False
    """whether an earlier group of the same tar has the same key"""

    def image(self, suffixes: Suffixes) -> T:
        """Returns the image. Raises ValueError, listing the members, if there is none or more than one."""
        found = [suffix for suffix in self.members if suffix in suffixes.image]
        if len(found) == 1:
            return self.members[found[0]]
        there = shorten(", ".join(f".{suffix}" for suffix in self.members), 150)
        if found:
            raise ValueError(f"has {len(found)} images ({there})")
        raise ValueError(f"has no image, only {there}")

    @property
    def is_document(self) -> bool:
        """Whether this group is a README, a licence or the like, and not a sample."""
        return self.key.rpartition("/")[2].lower() in _DOCUMENTS and not any(
            suffix in IMAGE_SUFFIXES for suffix in self.members
        )


def split_name(name: str) -> tuple[str, str]:
    """Splits a name into (key, suffix) at the first dot of its last path component, as webdataset does."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def member_text(data: bytes, suffix: str) -> str:
    """Decodes a text member. Raises ValueError, naming `suffix`, if it is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} of its .{suffix} is not UTF-8 text") from None


def member_json(data: bytes) -> dict:
    """Parses a JSON member. Raises ValueError if it is not a JSON object."""
    try:
        found = parse_json(data)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} of the JSON is not UTF-8 text") from None
    if not isinstance(found, dict):
        raise ValueError("the JSON is not an object")
    return found


def is_hidden(name: str) -> bool:
    """Returns whether a member is a hidden file, or has a name like `__meta__`."""
    may_be = name.startswith(".") or "/." in name or "__" in name
    return may_be and _HIDDEN.search(name) is not None


def group(members: Iterable[tuple[str, T, str]]) -> Iterator[Group[T]]:
    """Groups adjacent members, given as (name, member, fault), with equal keys into samples.

    Raises:
        CutShort: `members` raised it. The last group is yielded first, with a fault if it seems incomplete:
            the cut member has its key, or it lacks a suffix that the tar's first group has.
    """
    current: Group[T] | None = None
    done: set[str] = set()
    usual: set[str] = set()
    try:
        for name, member, fault in members:
            key, suffix = split_name(name)
            # Skips hidden files and names without a suffix silently, as webdataset does.
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
