"""The settings of a build. They decide its bytes, are stored in build.json, and are compared on --resume."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from d2s.common.files import read_json, write_json
from d2s.shards.build.layout import Layout
from d2s.shards.format.file_names import CHECKSUMS, SCRATCH, SETTINGS

INPUT = "input_sha256"
"""Key in build.json of the sha256 of caption files and split lists. Older data sets do not have this key."""


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """The settings that, together with the input, decide the bytes of a data set."""

    resize: int | None = None
    """Number of pixels to which the shorter side of larger images is shrunk. None keeps all sizes."""
    quality: int = 95
    """JPEG quality, 1 to 100, of images that are re-encoded."""
    layout: Layout = field(default_factory=Layout)
    """The order of the images and their division into shards."""
    quarantine: bool = False
    """Whether bad input is left out and listed in quarantine.jsonl. If False, the build stops at bad input."""
    decode: bool = True
    """Whether images are decoded if tars are indexed in place. If False, only image headers are read."""

    def __post_init__(self) -> None:
        if self.resize is not None and self.resize < 16:
            raise ValueError(f"resize={self.resize} is too small; 16 pixels at least")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality={self.quality} is out of range; 1 to 100, 95 by default")

    @property
    def in_place(self) -> bool:
        """Whether the build only indexes existing tars, which stay unchanged."""
        return self.layout.in_place is not None


def settings_of(config: BuildConfig, facts: dict | None = None) -> dict:
    """Returns the content of build.json: the settings that decide the bytes, and `facts` about the input."""
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
    # The conversion to JSON and back makes the settings comparable with settings read from a file.
    return json.loads(json.dumps(settings))


def is_complete(out: Path, settings: dict) -> bool:
    """Returns whether `out` has a complete data set. Raises ValueError if its settings or input differ."""
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
    """Stores settings and input of this build. Raises ValueError if the interrupted build had different ones.

    Args:
        scratch: the folder of unfinished work, which all parts of the build share.
        own: the folder that only this process writes to.
        assignment: the value of `assignment.digest`.
    """
    path = scratch / "settings.json"
    # `on_error` may change, because finished shards had no faults. INPUT is left out, because the digest covers it.
    deciding = {name: value for name, value in settings.items() if name not in ("on_error", INPUT)}
    now = {"settings": deciding, "assignment": assignment}
    if path.exists() and read_json(path) != now:
        remedy = "run with --force" if settings["in_place"] else "delete it, or build elsewhere"
        raise ValueError(f"{scratch.parent}: input or options changed since the interrupted build; {remedy}")
    # The file is written in `own` and then renamed, because another part may write the same file now.
    write_json(own / "own-settings.json", now)
    (own / "own-settings.json").replace(path)
