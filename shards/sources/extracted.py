"""Images that lie inside of parquet files, copied to plain files, from which the workers read them in any order."""

import hashlib
import os
import uuid
from pathlib import Path
from typing import Self

from d2s.shards.sources.entry import EXTRACTED


class ExtractedImages:
    """Writes the images of one parquet file one behind the other. It appears when it is complete."""

    def __init__(self, folder: Path | None, number: int) -> None:
        """`folder` is that of `SourceOptions.scratch`; `number` tells the files of one source apart."""
        self._folder, self._file, self._size = folder, None, 0
        self.path = (folder or Path()) / "images" / f"{number:05d}{EXTRACTED}"
        # Another part of the build may be writing the same file, with the same bytes.
        self._temporary = self.path.with_name(f"{self.path.stem}-{uuid.uuid4().hex}")

    def add(self, data: bytes) -> dict:
        """Appends an image. Returns the fields path, offset, size and sha256 of its entry."""
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
