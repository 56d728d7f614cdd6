"""The plan of a build: every image of the source, checked, joined with its captions, ordered, cut into shards.

All that can be found out without decoding images is found out here, before a shard is written. The plan lies on
disk and is memory-mapped by the workers; making it needs about 100 bytes an image.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np

from d2s.common.files import file_sha256
from d2s.shards.build import dense as dense_join
from d2s.shards.build.dense import DenseOptions
from d2s.shards.build.layout import Layout, Shard, arrange
from d2s.shards.build.listing import list_images, refuse_duplicates, refuse_shared_joins, rename
from d2s.shards.build.spool import Spool
from d2s.shards.format.sample import Entry, Faults


class Plan:
    """A plan on disk, opened for reading by whichever process writes shards."""

    def __init__(self, folder: Path) -> None:
        self._entries = Spool(folder / "entries.arrow")
        self._order = np.load(folder / "order.npy", mmap_mode="r")
        self._matched = np.load(folder / "matched.npy", mmap_mode="r")
        self._dense = Spool(folder / "dense.arrow") if (folder / "dense.arrow").exists() else None
        facts = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        self._renamed = {int(row): key for row, key in facts["renamed"].items()}
        self.shards = [Shard(*shard) for shard in facts["shards"]]
        self.counts: dict[str, int] = facts["counts"]
        self.extra: int = facts["extra"]

    def entries(self, shard: Shard) -> Iterator[Entry]:
        """The entries of a shard in their final order, with final key and captions."""
        for row in self._order[shard.start : shard.stop]:
            yield self._entry(int(row), shard.split)

    def _entry(self, number: int, split: str) -> Entry:
        row = self._entries.row(number)
        join = row.pop("join")
        del row["given"]
        row["split"] = split
        row["key"] = self._renamed.get(number, row["key"])
        row["sparse"], row["dense"] = tuple(row["sparse"]), tuple(row["dense"])
        entry = Entry(**row)
        if self._dense is None or self._matched[number] < 0:
            return entry
        found = self._dense.row(int(self._matched[number]))
        assert found["key"] == join, f"two join keys with one hash: {found['key']!r} and {join!r}"
        return replace(
            entry,
            sparse=tuple(found["sparse"]) or entry.sparse,
            dense=entry.dense + tuple(found["dense"]),
        )


def make_plan(
    folder: Path,
    entries: Iterable[Entry],
    *,
    dense: DenseOptions | None,
    layout: Layout,
    faults: Faults,
) -> Plan:
    """Lists, checks, joins, orders and cuts. Raises ValueError, one line, for what a user has to mend."""
    folder.mkdir(parents=True, exist_ok=True)
    found = list_images(entries, folder / "entries.arrow", dense, layout.seed, faults)
    if not len(found.names):
        raise ValueError("the source has no images; nothing to build")
    spool = Spool(folder / "entries.arrow")
    alive = np.frombuffer(found.alive, np.int8).astype(bool)
    refuse_duplicates(found, spool, alive, faults)
    matched, extra = np.full(len(alive), -1, np.int64), 0
    (folder / "dense.arrow").unlink(missing_ok=True)
    if dense is not None:
        refuse_shared_joins(found, spool, alive, dense, faults)
        hashes = np.frombuffer(found.joins, np.uint64)
        matched, extra = dense_join.join(
            dense,
            hashes,
            alive,
            folder / "dense.arrow",
            faults,
            lambda number: spool.row(int(number))["join"],
        )
    captions = np.frombuffer(found.captions, np.int64)
    for number in np.flatnonzero(alive & (captions == 0) & (matched < 0)):
        row = spool.row(int(number))
        faults.add(row["where"], f"image {row['source_id']!r} has no caption", row["source_id"])
        alive[number] = False
    shards, counts, order = arrange(
        found.groups(alive),
        np.frombuffer(found.order, np.uint64),
        np.frombuffer(found.sizes, np.int64),
        (np.frombuffer(found.tars, np.int32), found.tar_names),
        layout,
    )
    np.save(folder / "order.npy", order)
    np.save(folder / "matched.npy", matched)
    facts = {
        "renamed": rename(found, spool),
        "shards": [astuple(shard) for shard in shards],
        "counts": counts,
        "extra": extra,
    }
    (folder / "plan.json").write_text(json.dumps(facts), encoding="utf-8")
    return Plan(folder)


def digest(folder: Path) -> str:
    """A checksum of the whole plan: an interrupted build goes on only if its plan comes out the same."""
    names = ("entries.arrow", "dense.arrow", "order.npy", "matched.npy", "plan.json")
    sums = [file_sha256(folder / name) for name in names if (folder / name).exists()]
    return hashlib.sha256(" ".join(sums).encode()).hexdigest()
