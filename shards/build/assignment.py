"""Assigns each image of a source to a position in a shard: lists, checks, joins captions, sorts, cuts.

This finds all faults that do not need decoded images, before the first shard is written. The assignment is
stored on disk, and the workers memory-map it. Building an assignment takes about 100 bytes of memory per image.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np

from d2s.common.files import file_sha256
from d2s.common.messages import shorten
from d2s.shards.build.caption_join import JoinOptions, join_captions
from d2s.shards.build.image_list import exclude_ambiguous, exclude_duplicates, list_images, unique_keys
from d2s.shards.build.layout import Layout, Shard, arrange
from d2s.shards.format.row_file import RowFile
from d2s.shards.sources.entry import Entry
from d2s.shards.sources.faults import Faults

_FILES = ("entries.jsonl", "captions.jsonl", "order.npy", "matched.npy", "facts.json")
_ENTRIES, _CAPTIONS, _ORDER, _MATCHED, _FACTS = _FILES


class Assignment:
    """An assignment that is stored in `folder`, opened for reading."""

    def __init__(self, folder: Path) -> None:
        self._entries = RowFile(folder / _ENTRIES)
        self._order = np.load(folder / _ORDER, mmap_mode="r")
        self._matched = np.load(folder / _MATCHED, mmap_mode="r")
        self._captions = RowFile(folder / _CAPTIONS) if (folder / _CAPTIONS).exists() else None
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        self._renamed = {int(row): key for row, key in facts["renamed"].items()}
        self.shards = [Shard(*shard) for shard in facts["shards"]]
        self.counts: dict[str, int] = facts["counts"]
        """Maps each split to its number of images."""
        self.extra: int = facts["extra"]
        """Number of rows in the separate caption files that match no image."""

    def _joined(self, number: int | None, join: str) -> tuple[tuple, tuple]:
        """Returns an image's sparse and dense captions. number: its last row in the separate files. join: its key."""
        rows = []
        while number is not None:
            rows.append(found := self._captions.row(number))
            assert found["key"] == join, f"two join keys with one hash: {found['key']!r} and {join!r}"
            number = found.get("previous")
        if len(rows) == 1:
            return tuple(found["sparse"]), tuple(found["dense"])
        # A caption that occurs in several rows is used once.
        both = (
            dict.fromkeys(text for row in reversed(rows) for text in row[kind])
            for kind in ("sparse", "dense")
        )
        return tuple(map(tuple, both))

    def entries(self, shard: Shard) -> Iterator[Entry]:
        """Yields the entries of `shard` in their final order. Their keys, splits and captions are final, too."""
        for number in self._order[shard.start : shard.stop].tolist():
            row = self._entries.row(number)
            join = row.pop("join")
            del row["given"]
            row |= {"split": shard.split, "key": self._renamed.get(number, row["key"])}
            entry = Entry(**row | {kind: tuple(row[kind]) for kind in ("sparse", "dense")})
            if self._captions is not None and self._matched[number] >= 0:
                sparse, dense = self._joined(int(self._matched[number]), join)
                entry = replace(entry, sparse=sparse or entry.sparse, dense=entry.dense + dense)
            yield entry


def assign(
    folder: Path,
    entries: Iterable[Entry],
    *,
    join: JoinOptions | None,
    layout: Layout,
    faults: Faults,
) -> Assignment:
    """Writes the assignment to `folder` and opens it. Raises ValueError, in one line, for mistakes of the user."""
    images = list_images(entries, folder / _ENTRIES, join, layout.seed, faults)
    if not len(images.usable):
        raise ValueError("the source has no images; nothing to build")
    exclude_duplicates(images, faults)
    matched, extra = np.full(len(images.usable), -1, np.int64), 0
    (folder / _CAPTIONS).unlink(missing_ok=True)
    if join is not None:
        exclude_ambiguous(images, join, faults)
        matched, extra = join_captions(
            join,
            images.numbers["join"],
            images.usable,
            folder / _CAPTIONS,
            faults,
            lambda number: images.rows.row(number)["join"],
        )
    for number in np.flatnonzero(images.usable & (images.numbers["captions"] == 0) & (matched < 0)):
        row = images.rows.row(number)
        reason = f"image {shorten(repr(row['source_id']), 100)} has no caption{row['hint']}"
        faults.add(row["where"], reason, row["source_id"])
        images.usable[number] = False
    shards, counts, order = arrange(
        images.groups(),
        images.numbers["order"],
        images.numbers["bytes"],
        (images.numbers["tar"], images.tars),
        layout,
    )
    np.save(folder / _ORDER, order)
    np.save(folder / _MATCHED, matched)
    facts = {
        "renamed": unique_keys(images),
        "shards": [astuple(shard) for shard in shards],
        "counts": counts,
        "extra": extra,
    }
    (folder / _FACTS).write_text(json.dumps(facts), encoding="utf-8")
    return Assignment(folder)


def digest(folder: Path) -> str:
    """Returns a checksum of the assignment. An interrupted build continues only if the checksum is the same."""
    sums = [file_sha256(folder / name) for name in _FILES if (folder / name).exists()]
    return hashlib.sha256(" ".join(sums).encode()).hexdigest()
