"""Joins all rows of an image into one entry, even if they are not adjacent.

The rows are first written to a file on disk, so memory holds only about 40 bytes for each row.
"""

import json
import sys
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from d2s.shards.format.keys import hash64
from d2s.shards.format.row_file import RowFile, RowFileWriter
from d2s.shards.sources.entry import Entry
from d2s.shards.sources.faults import Faults

_KINDS = ("sparse", "dense")


def entries_of_rows(rows: Iterable[dict], scratch: Path | None, faults: Faults) -> Iterator[Entry]:
    """Yields an entry for each image. Images are ordered by their first rows.

    Rows with equal `source_id`, `split`, `image_id`, `key` and `sha256` describe the same image. Equal dense
    captions of an image are kept once. If a row only repeats one sparse caption, that caption is kept twice,
    and a message counts such rows. Any other row without a new caption is a fault.

    Args:
        rows: dictionaries with the fields of an entry.
        scratch: folder for the temporary file; None means the system's temporary folder.
    """
    hashes, names = array("Q"), array("Q")
    if scratch is not None:
        scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch, prefix="rows-") as folder:
        path = Path(folder) / "rows.jsonl"
        with RowFileWriter(path) as writer:
            for row in rows:
                hashes.append(hash64(_identity(row)))
                names.append(hash64(row["source_id"]))
                writer.append(row)
        stored = RowFile(path)
        repeats: list[str] = []
        groups, repeated = _groups(np.array(hashes, np.uint64)), _repeated(hashes, names)
        for numbers in groups:
            images: dict[str, dict] = {}
            for number in numbers:
                row = stored.row(number)
                image = images.setdefault(_identity(row), row)
                if image is not row:
                    _add(image, row, repeats, faults)
            for image in images.values():
                if image.get("sha256") and names[numbers[0]] in repeated:
                    # Another picture has the same name; the checksum makes the names differ.
                    image["source_id"] = f"{image['sha256'][:16]}/{image['source_id']}"
                yield Entry(**image | {kind: tuple(image[kind]) for kind in _KINDS})
    if repeats:
        print(
            f"{len(repeats):,} rows repeat a caption of their image; kept (first: {repeats[0]})",
            file=sys.stderr,
        )


def _identity(row: dict) -> str:
    names = ("source_id", "split", "image_id", "key", "sha256")
    return json.dumps([row.get(name) for name in names])


def _groups(hashes: np.ndarray) -> Iterator[list[int]]:
    """Yields the positions of equal hashes as a list. The lists are ordered by their first position."""
    order = np.argsort(hashes, kind="stable")
    starts = np.flatnonzero(np.diff(hashes[order], prepend=hashes[order[:1]] + np.uint64(1)))
    stops = np.append(starts[1:], len(order))
    for group in np.argsort(order[starts], kind="stable").tolist():
        yield order[starts[group] : stops[group]].tolist()


def _repeated(hashes: array, names: array) -> set[int]:
    """Returns hashes of names that several images have. Takes hashes of each row's identity and name."""
    first = np.unique(np.array(hashes, np.uint64), return_index=True)[1]
    values, counts = np.unique(np.array(names, np.uint64)[first], return_counts=True)
    return set(values[counts > 1].tolist())


def _add(image: dict, row: dict, repeats: list[str], faults: Faults) -> None:
    """Adds the captions of a later row to an image, or reports the row if it has no new caption."""
    new = {kind: [text for text in row[kind] if text not in image[kind]] for kind in _KINDS}
    if not new["sparse"] and not new["dense"]:
        if len(row["sparse"]) != 1:
            name = row["source_id"]
            reason = (
                f"image {name!r} stands here a second time, with the same captions (first: {image['where']})"
            )
            faults.add(row["where"], reason, name)
            return
        repeats.append(row["where"])
    if new["sparse"] or not new["dense"]:
        image["sparse"] += row["sparse"]
    image["dense"] += new["dense"]
