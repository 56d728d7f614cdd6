"""The settings of a build: what decides its bytes, kept in build.json and compared when a build is resumed."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from d2s.common.files import read_json, write_json
from d2s.shards.build.layout import Layout
from d2s.shards.format.file_names import CHECKSUMS, SCRATCH, SETTINGS

INPUT = "input_sha256"
"""In build.json: the sha256 over the caption files and split lists. Older data sets have none."""


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """What decides the bytes of a data set, besides its input."""

    resize: int | None = None
    """shrink the shorter side of larger images to so many pixels"""
    quality: int = 95
    """JPEG quality of images that are re-encoded, 1 to 100"""
    layout: Layout = field(default_factory=Layout)
    """how the images are ordered and cut into shards"""
    quarantine: bool = False
    """list and leave out bad input instead of stopping at it"""
    decode: bool = True
    """for tars indexed in place: False reads only the headers of the images"""

    def __post_init__(self) -> None:
        if self.resize is not None and self.resize < 16:
            raise ValueError(f"resize={self.resize} is too small; 16 pixels at least")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality={self.quality} is out of range; 1 to 100, 95 by default")

    @property
    def in_place(self) -> bool:
        """Whether the tars exist already and stay as they are."""
        return self.layout.in_place is not None


def settings_of(config: BuildConfig, facts: dict | None = None) -> dict:
    """The content of build.json: all that decides the bytes, nothing about the machine or the time."""
    layout = config.layout
    size = layout.shard_size
    settings = {
        "version": 1,
        "resize": config.resize,
        "quality": config.quality,
        "shard_size": size.samples if size.bytes is None else f"{size.bytes} bytes",
        "seed": layout.seed,
        "holdout": layout.holdout,
        "in_place": config.in_place,
        "decoded": config.decode,
        "on_error": "quarantine" if config.quarantine else "stop",
        **(facts or {}),
    }
    # Through JSON, so that it can be compared with the content of a file.
    return json.loads(json.dumps(settings))


def is_complete(out: Path, settings: dict) -> bool:
    """Whether the data set in `out` is complete. Raises ValueError if it has other settings or input."""
    if not (out / CHECKSUMS).exists():
        return False
    found = read_json(out / SETTINGS) if (out / SETTINGS).exists() else {}
    if found | {INPUT: None} != settings | {INPUT: None}:
        raise ValueError(f"--out {out}: a data set of other settings lies there; choose another folder")
    if INPUT in found and found[INPUT] != settings.get(INPUT):
        raise ValueError(
            f"--out {out}: a data set of other captions or splits lies there; choose another folder"
        )
    shutil.rmtree(out / SCRATCH, ignore_errors=True)
    return True


def check_same_build(scratch: Path, own: Path, settings: dict, assignment: str) -> None:
    """Records what is being built. Raises ValueError if the interrupted build in `scratch` was another one.

    Args:
        own: the folder that only this process writes to.
        assignment: the digest of the assignment.
    """
    path = scratch / "settings.json"
    # `on_error` may change, because finished shards had no faults. The digest covers the input better than INPUT.
    deciding = {name: value for name, value in settings.items() if name not in ("on_error", INPUT)}
    now = {"settings": deciding, "assignment": assignment}
    if path.exists() and read_json(path) != now:
        remedy = "run with --force" if settings["in_place"] else "delete it, or build elsewhere"
        raise ValueError(f"{scratch.parent}: input or options changed since the interrupted build; {remedy}")
    # Renamed from a file of its own, because another part may be writing the same.
    write_json(own / "own-settings.json", now)
    (own / "own-settings.json").replace(path)
