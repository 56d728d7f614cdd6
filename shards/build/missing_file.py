"""Looks for a missing file under the names that are usually meant: other slashes, upper case, a folder twice."""

import os
import unicodedata
from collections.abc import Iterator

_SUFFIXES = (".jpg", ".jpeg", ".png")


def remedy(path: str) -> str:
    """The end of a message that a file does not exist: which one does, or what names are relative to."""
    for other in _other_names(path):
        if os.path.isfile(other):
            return f"; {other} does: write its name so"
    return "; names are relative to --images, or else to the file of captions"


def _other_names(path: str) -> Iterator[str]:
    """Names that differ from `path`."""
    # A path of Windows, and perhaps more.
    plain = path.replace("\\", "/")
    names = [plain]
    parts = plain.split("/")
    # The folder of images stands in the names too.
    names += [
        "/".join(parts[:at] + parts[at + 1 :])
        for at, part in enumerate(parts[:-1])
        if part and part == parts[at + 1]
    ]
    for name in names:
        stem, suffix = os.path.splitext(name)
        suffixes = {suffix.lower(), suffix.upper(), *(_SUFFIXES if not suffix else ())}
        found = [name, *(stem + other for other in sorted(suffixes))]
        # macOS takes accents apart from their letters.
        for form in ("NFC", "NFD"):
            yield from (unicodedata.normalize(form, other) for other in found)
