"""Yields entries of scenes that `d2s.shards.scenes` draws, so that nothing must be downloaded."""

from collections.abc import Iterator
from dataclasses import replace

from d2s.shards import scenes
from d2s.shards.sources.entry import Entry, SourceOptions
from d2s.shards.sources.faults import Faults

NEEDS = ("counts",)
USES = ("size",)


def entries(options: SourceOptions, faults: Faults) -> Iterator[Entry]:
    """Yields an entry for each scene, without captions. The worker that writes the shard draws the scene."""
    for number, split in scenes.scene_numbers(options.counts, options.size):
        key = f"scene-{number:07d}"
        yield Entry(
            split=split,
            source_id=key,
            where=f"scenes: {key}",
            image_id=number,
            number=number,
            seed=options.seed,
            size=options.size,
        )


def draw(entry: Entry) -> tuple[Entry, bytes]:
    """Draws the scene of an entry. Returns a copy of the entry with captions, and the encoded picture."""
    scene = scenes.scene(entry.number, entry.seed, entry.size)
    return replace(entry, sparse=scene.sparse, dense=scene.dense), scene.encoded()
