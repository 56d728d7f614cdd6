"""The settings of a build, which decide its bytes. They are stored in build.json and compared on --resume."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from d2s.common.files import read_json, write_json
from d2s.shards.build.layout import Layout
from d2s.shards.format.file_names import CHECKSUMS, SCRATCH, SETTINGS

INPUT = "input_sha256"
"""Key in build.json for the sha256 of the caption files and split lists. Older data sets do not have it."""


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """The settings that, together with the input, decide the bytes of a data set."""

    resize: int | None = None
    """shrink the shorter side of larger images to this number of pixels"""
    quality: int = 95
    """JPEG quality of images that are re-encoded, 1 to 100"""
    layout: Layout = field(default_factory=Layout)
    """how the images are ordered and cut into shards"""
    quarantine: bool = False
    """list bad input and leave it out, instead of stopping at it"""
    decode: bool = True
    """for tars indexed in place: False reads only the headers of images"""

    def __post_init__(self) -> None:
        if self.resize is not None and self.resize < 16:
            raise ValueError(f"resize={self.resize} is too small; 16 pixels at least")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality={self.quality} is out of range; 1 to 100, 95 by default")

    @property
    def in_place(self) -> bool:
        """Whether the tars exist already and stay unchanged."""
        return self.layout.in_place is not None


def settings_of(config: BuildConfig, facts: dict | None = None) -> dict:
    """Returns the content of build.json: all that decides the bytes, nothing of machine or time."""
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
    # Converted to JSON and back, so that the result can be compared with settings read from a file.
    return json.loads(json.dumps(settings))


def is_complete(out: Path, settings: dict) -> bool:
    """Returns whether `out` has a complete data set. Raises ValueError if it has other settings or input."""
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
    """Records the settings and input of this build. Raises ValueError if the interrupted build had others.

    Args:
        own: the folder that only this process writes to.
        assignment: the digest of the assignment.
    """
    path = scratch / "settings.json"
    # `on_error` may change, as finished shards had no faults. INPUT is not needed: the digest covers it.
    deciding = {name: value for name, value in settings.items() if name not in ("on_error", INPUT)}
    now = {"settings": deciding, "assignment": assignment}
    if path.exists() and read_json(path) != now:
        remedy = "run with --force" if settings["in_place"] else "delete it, or build elsewhere"
        raise ValueError(f"{scratch.parent}: input or options changed since the interrupted build; {remedy}")
    # The file is written in `own` and then renamed, because another part may write it at the same time.
    write_json(own / "own-settings.json", now)
    (own / "own-settings.json").replace(path)
