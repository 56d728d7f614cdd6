"""What passes from a source to a shard: an `Entry` says where a sample lies, a `Sample` holds its bytes."""

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

SPLIT_ORDER = ("train", "val", "test")
_UNCLEAN = re.compile(r"[^A-Za-z0-9_-]+")
_KEY_LENGTH = 80


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image with its captions, as it is stored.

    `image` is the encoded file (JPEG, PNG or WebP; `suffix` says which). Captions are sparse (short, one view
    each) or dense (long, nearly everything).
    """

    key: str
    image: bytes
    suffix: str
    sparse: tuple[str, ...]
    dense: tuple[str, ...]
    image_id: int
    source_id: str
    split: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One image of a source before its bytes are read: light, picklable, cheap to list by the million.

    The bytes are the whole file at `path`, or `size` bytes from `offset` where `offset` >= 0 (a member of a
    tar), or, where `number` >= 0, scene `number` of the world `seed` at `size` pixels, which the worker draws
    and words. `where` is the place in the source that error messages name. `image_id` None takes the next
    number; `key` None derives the key from `source_id`; one that is given has to be unique, but for those in
    tars. `sha256` is that of the original image where the source knows it; `filename` is what captions may be
    joined by, where it is not `source_id`.
    """

    split: str
    source_id: str
    where: str
    sparse: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()
    image_id: int | None = None
    key: str | None = None
    path: str = ""
    offset: int = -1
    size: int = -1
    sha256: str = ""
    filename: str = ""
    number: int = -1
    seed: int = 0


@dataclass
class Faults:
    """Where bad input goes: the first one stops the build, or each is listed and left out (`quarantine`)."""

    quarantine: bool = False
    rows: list[dict[str, str]] = field(default_factory=list)

    def add(self, where: str, reason: str, key: str = "") -> None:
        """Records one fault. Raises ValueError at once unless faults are quarantined."""
        # Names in a source may hold line breaks and halves of surrogate pairs, which no terminal takes.
        where, reason, key = (_one_line(text) for text in (where, reason, key))
        if not self.quarantine:
            raise ValueError(f"{where}: {reason}")
        self.rows.append({"where": where, "key": key, "reason": reason})


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What a source may need; which of these it does need, it says in `NEEDS`."""

    captions: tuple[tuple[str | None, Path], ...] = ()
    """caption files, each with the split it was given for, if any"""
    images: Path | None = None
    split: str = "train"
    """of whatever knows no split of its own"""
    split_lists: dict[str, Path] = field(default_factory=dict)
    """flickr: for each split the file that lists its images"""
    columns: dict[str, str] = field(default_factory=dict)
    """jsonl, parquet: what our names (path, sparse, dense, split, id) are called there"""
    dense_columns: tuple[str, ...] = ("text",)
    """release: the field of the aligned JSON lines"""
    counts: dict[str, int] = field(default_factory=dict)
    """scenes: images a split"""
    size: int = 64
    """scenes: pixels a side"""
    seed: int = 0
    """scenes: of the world"""
    workers: int = 1

    @property
    def caption_file(self) -> Path:
        """The one caption file. Raises ValueError if there are several."""
        if len(self.captions) != 1:
            raise ValueError(f"--captions: this source takes one file, not {len(self.captions)}")
        return self.captions[0][1]


def clean_key(name: str) -> str:
    """The file name without folder and suffix, as a key that any WebDataset reader takes: no dot, no slash."""
    stem = name.replace("\\", "/").rsplit("/", 1)[-1]
    stem = stem.rsplit(".", 1)[0] or stem
    key = _UNCLEAN.sub("_", stem).strip("_")
    if not key:
        return f"x{hash64(name):016x}"
    return key if len(key) <= _KEY_LENGTH else f"{key[: _KEY_LENGTH - 17]}-{hash64(name):016x}"


def hash64(text: str, secret: bytes = b"") -> int:
    """A 64-bit keyed hash of a string (BLAKE2b): the same on every machine and in every process."""
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=secret).digest(), "little"
    )


def split_rank(split: str) -> tuple[int, str]:
    """Sort key of the splits: train, val, test, then the others by name."""
    return (SPLIT_ORDER.index(split) if split in SPLIT_ORDER else len(SPLIT_ORDER), split)


def _one_line(text: str) -> str:
    plain = text.encode("utf-8", "backslashreplace").decode()
    return plain.replace("\r", "\\r").replace("\n", "\\n")


def caption_fault(captions: tuple[str, ...]) -> str | None:
    """Why these captions cannot be stored, or None: each is a string with something in it, valid Unicode."""
    for number, caption in enumerate(captions):
        if not isinstance(caption, str):
            return f"caption {number} is {type(caption).__name__}, not text"
        if not caption.strip():
            return f"caption {number} is empty"
        try:
            caption.encode("utf-8")
        except UnicodeEncodeError:
            return f"caption {number} is not valid Unicode"
    return None


def text_field(row: dict, name: str) -> str:
    """A field that has to hold text. Raises KeyError if it is not there, TypeError if it holds anything else."""
    value = row[name]
    if not isinstance(value, str) or not value:
        raise TypeError(f"field {name!r} is {value!r}, not text")
    if caption_fault((value,)):
        raise TypeError(f"field {name!r} is {value!r}, not valid text")
    return value


def whole_field(row: dict, name: str) -> int:
    """A field that has to hold a whole number. Raises KeyError or TypeError as `text_field` does."""
    value = row[name]
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"field {name!r} is {value!r}, not a whole number")
    return value


def field_fault(error: KeyError | TypeError) -> str:
    """A source's row without a field, or with something else in it, in words."""
    return f"no field {error}" if isinstance(error, KeyError) else str(error)
