"""Makes keys of samples, hashes names, and defines the order of splits."""

import hashlib
import re

SPLIT_ORDER = ("train", "val", "test")
_UNCLEAN = re.compile(r"[^A-Za-z0-9_-]+")
_KEY_LENGTH = 80


def clean_key(name: str) -> str:
    """Makes a sample's key from a file name. The key has no folder, suffix, dot or slash, as WebDataset needs."""
    stem = name.replace("\\", "/").rsplit("/", 1)[-1]
    stem = stem.rsplit(".", 1)[0] or stem
    key = _UNCLEAN.sub("_", stem).strip("_")
    if not key:
        return f"x{hash64(name):016x}"
    return key if len(key) <= _KEY_LENGTH else f"{key[: _KEY_LENGTH - 17]}-{hash64(name):016x}"


def hash64(text: str, secret: bytes = b"") -> int:
    """Returns the 64-bit BLAKE2b hash of `text` with the key `secret`. All machines return the same hash."""
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=secret).digest(), "little")


def split_rank(split: str) -> tuple[int, str]:
    """Returns a sort key that puts train, val and test first, and then all other splits by name."""
    return (SPLIT_ORDER.index(split) if split in SPLIT_ORDER else len(SPLIT_ORDER), split)
