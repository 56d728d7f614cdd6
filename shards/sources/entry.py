"""What a source yields (`Entry`), and the options it is given (`SourceOptions`)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

EXTRACTED = ".images"
"""The suffix of files of images that were copied out of parquet files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One image of a source, before its bytes are read: light, picklable, cheap to list by the million.

    The image is one of three things: the file at `path`; `size` bytes of it from `offset`, where `offset` >= 0 (a
    member of a tar, or an image of parquet in a file of extracted ones); or, where `number` >= 0, scene `number` of
    world `seed`, drawn by the worker at `size` pixels.
    """

    split: str
    source_id: str
    """name of the image, unique in the source"""
    where: str
    """place in the source that error messages name"""
    sparse: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()
    image_id: int | None = None
    """None takes the next number"""
    key: str | None = None
    """None derives the key from `source_id`; a given key must be unique, except in tars"""
    path: str = ""
    offset: int = -1
    size: int = -1
    sha256: str = ""
    """of the original image, where the source knows it"""
    filename: str = ""
    """name by which separate captions are joined; "" takes `source_id`"""
    number: int = -1
    seed: int = 0
    hint: str = ""
    """what to say if it has no caption at all, not even a joined one"""

    @property
    def in_tar(self) -> bool:
        """Whether the image is a member of a tar."""
        return self.offset >= 0 and not self.path.endswith(EXTRACTED)


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Options of all sources, named as those of the command. `NEEDS` and `USES` of a source say which it reads."""

    captions: Sequence[tuple[str | None, Path]] = ()
    """caption files, each with the split it was given for, if any"""
    images: Path | None = None
    """folder of images or tars"""
    split: str = "train"
    """of images whose source names no split"""
    forced_split: str = ""
    """the split that the user named; it also replaces a split guessed from a file's name"""
    split_lists: dict[str, Path] = field(default_factory=dict)
    """flickr: the file that lists the images of each split"""
    columns: dict[str, str] = field(default_factory=dict)
    """jsonl, csv, parquet: their names for our columns path, sparse, dense, split, id, several between commas;
    img2dataset: the fields with sparse and dense captions"""
    suffixes: dict[str, str] = field(default_factory=dict)
    """img2dataset: the suffixes of image, caption, dense, json in a sample"""
    scratch: Path | None = None
    """folder for copies of images from parquet files, for unpacked tars and for temporary files"""
    dense_columns: tuple[str, ...] = ("text",)
    """release: the fields of the aligned JSON lines"""
    counts: dict[str, int] = field(default_factory=dict)
    """scenes: images in each split"""
    size: int = 64
    """scenes: width and height in pixels"""
    seed: int = 0
    """scenes: seed of the world"""
    workers: int = 1
    """processes that read tars"""

    @property
    def caption_file(self) -> Path:
        """The one caption file. Raises ValueError if there are several."""
        if len(self.captions) != 1:
            raise ValueError(f"--captions: this source takes one file, not {len(self.captions)}")
        return self.captions[0][1]
