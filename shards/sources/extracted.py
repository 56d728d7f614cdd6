"""Copies images out of parquet files into plain files, so that workers can read them in any order."""

import hashlib
import os
import uuid
from pathlib import Path
from typing import Self

from d2s.shards.sources.entry import EXTRACTED


class ExtractedImages:
    """Writes all images of one parquet file into one file, which gets its final name when it is complete."""

    def __init__(self, folder: Path | None, number: int) -> None:
        """folder: `SourceOptions.scratch`. number: makes the name of the file unique in its source."""
        self._folder, self._file, self._size = folder, None, 0
        self.path = (folder or Path()) / "images" / f"{number:05d}{EXTRACTED}"
        # Another machine of the same build (--part) may be writing the same file.
        self._temporary = self.path.with_name(f"{self.path.stem}-{uuid.uuid4().hex}")

    def add(self, data: bytes) -> dict:
        """Appends an image. Returns the fields path, offset, size and sha256 for the image's entry."""
        if self._file is None:
            if self._folder is None:
                raise ValueError(
                    "images inside of parquet need SourceOptions.scratch, a folder to copy them to"
                )
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._temporary, "wb", buffering=1 << 20)  # noqa: SIM115 (closed by __exit__)
        self._file.write(data)
        self._size += len(data)
        place = {"path": str(self.path), "offset": self._size - len(data), "size": len(data)}
        return place | {"sha256": hashlib.sha256(data).hexdigest()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            if kind is None:
                os.replace(self._temporary, self.path)
            else:
                self._temporary.unlink()
