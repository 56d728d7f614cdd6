"""Makes keys of samples, hashes names, and defines the order of splits."""

import hashlib
import re

SPLIT_ORDER = ("train", "val", "test")
_UNCLEAN = re.compile(r"[^A-Za-z0-9_-]+")
_KEY_LENGTH = 80


def clean_key(name: str) -> str:
    """Makes a key for any WebDataset reader from a file name: no folder, suffix, dots or slashes."""
    stem = name.replace("\\", "/").rsplit("/", 1)[-1]
    stem = stem.rsplit(".", 1)[0] or stem
    key = _UNCLEAN.sub("_", stem).strip("_")
    if not key:
        return f"x{hash64(name):016x}"
    return key if len(key) <= _KEY_LENGTH else f"{key[: _KEY_LENGTH - 17]}-{hash64(name):016x}"


def hash64(text: str, secret: bytes = b"") -> int:
    """Returns a keyed 64-bit hash of a string (BLAKE2b), equal on all machines and in all processes."""
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=secret).digest(), "little")


def split_rank(split: str) -> tuple[int, str]:
    """Returns the sort key of a split: train, val, test, then all others by name."""
    return (SPLIT_ORDER.index(split) if split in SPLIT_ORDER else len(SPLIT_ORDER), split)
