"""Stores rows on disk as JSON lines, which many processes can read with little memory (memory-mapped)."""

import json
import mmap
from array import array
from pathlib import Path
from typing import Self

import numpy as np


class RowFileWriter:
    """Appends rows (dictionaries) to a file. Closing it writes the offsets of all rows to a .npy file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "wb")  # noqa: SIM115 (closed by __exit__)
        self._offsets = array("q", [0])

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def append(self, row: dict) -> None:
        """Appends one row."""
        line = json.dumps(row, default=str, separators=(",", ":")).encode() + b"\n"
        self._file.write(line)
        self._offsets.append(self._offsets[-1] + len(line))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        np.save(self._path.with_suffix(".npy"), np.array(self._offsets))


class RowFile:
    """Reads rows by number. Processes that open the same file share its memory."""

    def __init__(self, path: Path) -> None:
        self._offsets = np.load(path.with_suffix(".npy"), mmap_mode="r")
        with open(path, "rb") as file:
            # An empty file cannot be mapped.
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if len(self) else b""

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def row(self, number: int) -> dict:
        """Returns row `number` as a dictionary. Tuples were stored as lists."""
        return json.loads(self._data[self._offsets[number] : self._offsets[number + 1]])
