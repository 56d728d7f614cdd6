"""Drawn scenes, see `d2s.shards.scenes`: nothing to download."""

from collections.abc import Iterator
from dataclasses import replace

from d2s.shards import scenes
from d2s.shards.sources.entry import Entry, SourceOptions
from d2s.shards.sources.faults import Faults

NEEDS = ("counts",)
USES = ("size",)


def entries(options: SourceOptions, faults: Faults) -> Iterator[Entry]:
    """One entry for each scene, without picture or captions: a worker draws them when it writes the shard."""
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
    """Draws the scene of an entry: returns the entry with its captions, and the encoded picture."""
    scene = scenes.scene(entry.number, entry.seed, entry.size)
    return replace(entry, sparse=scene.sparse, dense=scene.dense), scene.encoded()
