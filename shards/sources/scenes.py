"""Drawn scenes: nothing to download; see `d2s.shards.scenes`."""

from collections.abc import Iterator
from dataclasses import replace

from d2s.shards import scenes
from d2s.shards.format.sample import Entry, Faults, SourceOptions

NEEDS = ("counts",)


def entries(options: SourceOptions, faults: Faults) -> Iterator[Entry]:
    """One entry a scene, without picture or captions: the worker that needs them draws them."""
    for entry in scenes.plan(options.counts, options.seed, options.size):
        yield Entry(
            split=entry.split,
            source_id=entry.key,
            where=f"scenes: {entry.key}",
            image_id=entry.number,
            number=entry.number,
            seed=options.seed,
            size=options.size,
        )


def draw(entry: Entry) -> tuple[Entry, bytes]:
    """The scene of an entry: the entry with its captions, and the encoded picture."""
    scene = scenes.scene(entry.number, entry.seed, entry.size)
    return replace(entry, sparse=scene.sparse, dense=scene.dense), scene.encoded()
