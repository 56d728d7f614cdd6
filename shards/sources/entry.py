"""Defines `Entry`, which every source yields, and `SourceOptions`, which every source receives."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

EXTRACTED = ".images"
"""Suffix of the files that `ExtractedImages` writes: each contains the images of one parquet file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """Describes one image and its captions without the image's bytes. It is small and can be pickled.

    If `number` >= 0, the image is scene `number` of world `seed`, which a worker draws at `size` pixels. If
    `offset` >= 0, it is `size` bytes of the file `path`, starting at `offset` (a member of a tar, or an image
    copied from parquet). Otherwise it is the whole file `path`.
    """

    split: str
    source_id: str
    """name of the image; unique in the source"""
    where: str
    """file and line (or the like) for error messages"""
    sparse: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()
    image_id: int | None = None
    """None means that the build assigns a number"""
    key: str | None = None
    """None means that the key is made from `source_id`; a given key must be unique, except in tars"""
    path: str = ""
    offset: int = -1
    size: int = -1
    sha256: str = ""
    """checksum of the original image, or "" if the source does not know it"""
    filename: str = ""
    """name that rows of separate captions are matched with; "" means `source_id`"""
    number: int = -1
    seed: int = 0
    hint: str = ""
    """end of the error message if the image has no caption, not even a separate one"""

    @property
    def in_tar(self) -> bool:
        """Whether the image is a member of a tar."""
        return self.offset >= 0 and not self.path.endswith(EXTRACTED)


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """The options of all sources, named like those of the command. Each source reads only some of them."""

    captions: Sequence[tuple[str | None, Path]] = ()
    """(split, path) of each caption file; the split is None unless the user wrote SPLIT=FILE"""
    images: Path | None = None
    """folder of images or tars"""
    split: str = "train"
    """split for images whose source names no split"""
    forced_split: str = ""
    """the value of --split, or ""; it also replaces a split that is guessed from a file's name"""
    split_lists: dict[str, Path] = field(default_factory=dict)
    """flickr: maps each split to the file that lists its images"""
    columns: dict[str, str] = field(default_factory=dict)
    """jsonl, csv, parquet: maps our names (path, sparse, dense, split, id) to column names of the file;
    img2dataset: maps sparse and dense to fields of the JSON. Several names are separated by commas."""
    suffixes: dict[str, str] = field(default_factory=dict)
    """img2dataset: maps image, caption, dense and json to the suffix of that member of a sample"""
    scratch: Path | None = None
    """folder for copies of images from parquet files, for unpacked tars and for temporary files"""
    dense_columns: tuple[str, ...] = ("text",)
    """release: fields of <data set>_<split>.jsonl that contain dense captions"""
    counts: dict[str, int] = field(default_factory=dict)
    """scenes: number of images in each split"""
    size: int = 64
    """scenes: width and height in pixels"""
    seed: int = 0
    """scenes: random seed of the world, which all scenes depend on"""
    workers: int = 1
    """number of processes that read tars"""

    @property
    def caption_file(self) -> Path:
        """Returns the only caption file. Raises ValueError if there is not exactly one."""
        if len(self.captions) != 1:
            raise ValueError(f"--captions: this source takes one file, not {len(self.captions)}")
        return self.captions[0][1]
