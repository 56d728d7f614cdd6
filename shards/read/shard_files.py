"""Compares files with the index when a data set is opened. Training would find these faults only after hours."""

import os
from pathlib import Path

import numpy as np

from d2s.shards.format.file_names import INDEX

_CHUNK = 1 << 18


def check_files(root: Path, names: list[str], sized: bool) -> list[int]:
    """Returns the size of each file in bytes, or zeros if not `sized`. Raises ValueError if a file is missing."""
    found: dict[str, int] = {}
    # Whole folders are listed, because asking a shared disk for thousands of single files is slow.
    for folder in {os.path.dirname(name) for name in names}:
        try:
            with os.scandir(root / folder) as entries:
                files = [entry for entry in entries if entry.is_file()]
            found |= {os.path.join(folder, e.name): e.stat().st_size if sized else 0 for e in files}
        except (OSError, ValueError):
            # The folder is missing or its name is damaged. Its files are reported as missing below.
            continue
    missing = next((name for name in names if name not in found), None)
    if missing is not None:
        raise ValueError(f"{root / missing}: no such file, but the index names it: copy it here again")
    return [found[name] for name in names]


def check_lengths(
    root: Path, places: dict[str, np.ndarray], names: list[str], sizes: list[int], sidecar: bool
) -> None:
    """Raises ValueError if a file ends before the end of its last sample.

    Args:
        places: maps each index column that locates samples to its values, of shape (rows,).
        names: the names of the shards. If `sidecar`, the name of the file with all captions follows.
        sizes: the length in bytes of each file in `names`.
    """
    shards = len(names) - sidecar
    ends = np.zeros(len(names), np.int64)
    for start in range(0, len(places["shard"]), _CHUNK):
        part = {name: column[start : start + _CHUNK] for name, column in places.items()}
        shard = part["shard"]
        wrong = np.flatnonzero((shard < 0) | (shard >= shards))
        if wrong.size:
            reason = f"row {start + wrong[0]} is in shard {shard[wrong[0]]} of {shards}"
            raise ValueError(f"{root / INDEX} is damaged: {reason}: build the data set again")
        np.maximum.at(ends, shard, part["image_offset"] + part["image_size"])
        captions = np.full_like(shard, shards) if sidecar else shard
        np.maximum.at(ends, captions, part["json_offset"] + part["json_size"])
    for name, size, end in zip(names, sizes, ends.tolist(), strict=True):
        if size < end:
            reason = f"cut short: {size:,} bytes, but its samples end at {end:,}"
            raise ValueError(f"{root / name}: {reason}; copy it here again, or build the data set again")
