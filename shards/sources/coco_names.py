"""Finds COCO's images, which have different names and folders in the releases of 2014 and 2017."""

import re
from collections.abc import Iterator
from pathlib import Path

_NAME = re.compile(r"(?:COCO_(?:train|val)2014_)?([0-9]{12}\.jpg)")
_YEARS = {"2014": ("COCO_train2014_", "COCO_val2014_"), "2017": ("", "")}


def find_image(expected: Path, images: Path) -> Path:
    """Returns `expected` if it exists, else the same photograph in another release, else `expected`."""
    match = _NAME.fullmatch(expected.name)
    if match is None or expected.exists():
        return expected
    return next((path for path in _places(images, match[1]) if path.exists()), expected)


def _places(images: Path, number: str) -> Iterator[Path]:
    for year, prefixes in _YEARS.items():
        for split, prefix in zip(("train", "val"), prefixes, strict=True):
            yield images / f"{split}{year}" / f"{prefix}{number}"
            yield images / f"{prefix}{number}"
