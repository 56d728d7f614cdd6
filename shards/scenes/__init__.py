"""A procedural data set: pictures of simple objects with five sparse captions and a dense one each.

It exists for the demo, the tests and the ablation: no downloads, and every property of the data can be
measured, because a caption is worded from claims whose truth can be checked (`d2s.shards.scenes.claims`).

A scene has four to six objects (shape, colour, texture, size, place, relation) on a background. The dense
caption names them all; a sparse caption is a view of that: one or two objects with some of their attributes,
or the number of objects alike, or an object and the background. How the world is made decides what can be
learned from it:

- *Families of look-alikes.* Five scenes with neighbouring numbers share theme, background and most objects,
  and differ by one or two edits. A sparse caption is often true of several, the dense caption of one.
- *Themes.* Backgrounds, objects, their attributes and their company go together (a dark sky, a yellow
  crescent, white stars). So what a sparse caption says tells something about what it leaves out; without
  that, nothing could be learned by predicting the dense embedding from the sparse caption.
- *Points of view.* The five captions of an image take turns over its objects, so they overlap little.

The knobs are constants at the head of `world` (how look-alike, how regular) and of `captions` (how much is
said).

Left and right matter in the captions: train without horizontal flips, and with little cropping.
"""

import io
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from PIL import Image

from d2s.shards.scenes import captions, draw, world

SPLIT_STARTS = {"train": 0, "val": 8_000_000, "test": 9_000_000}
SPLIT_STOPS = {"train": 8_000_000, "val": 9_000_000, "test": 10_000_000}


@dataclass(frozen=True)
class Scene:
    """A scene: what it shows and what is said about it; the picture is drawn when asked for."""

    number: int
    seed: int
    size: int
    content: world.Content
    sparse_captions: tuple[captions.Caption, ...] = field(repr=False)
    dense_caption: captions.Caption = field(repr=False)

    suffix = "jpg"

    @property
    def objects(self) -> tuple[world.Thing, ...]:
        """The objects in the scene."""
        return self.content.things

    @property
    def sparse(self) -> tuple[str, ...]:
        """Five captions, each about a part of the scene."""
        return tuple(caption.text for caption in self.sparse_captions)

    @property
    def dense(self) -> tuple[str, ...]:
        """One caption about all of it."""
        return (self.dense_caption.text,)

    def image(self) -> Image.Image:
        """The picture, RGB, size x size pixels."""
        return draw.render(self.content, self.size, _draws(self.seed, self.number, "picture"))

    def encoded(self) -> bytes:
        """The picture as a file whose suffix is `suffix`: the same bytes each time with the same Pillow."""
        buffer = io.BytesIO()
        self.image().save(buffer, "JPEG", quality=95, subsampling=0)
        return buffer.getvalue()


@dataclass(frozen=True)
class SceneEntry:
    """One scene of a planned data set."""

    number: int
    split: str
    key: str


def scene(number: int, seed: int, size: int) -> Scene:
    """Scene `number` of the world `seed`, to be drawn at `size` x `size` pixels.

    A function of its arguments alone, in any order and process; `size` changes neither objects nor captions.

    Raises:
        ValueError: if the number is negative or the size is below 16 pixels.
    """
    if number < 0:
        raise ValueError(f"scene number {number}: must not be negative")
    if size < 16:
        raise ValueError(f"scene size {size}: must be at least 16 pixels")
    content = world.content(seed, number)
    return Scene(
        number=number,
        seed=seed,
        size=size,
        content=content,
        sparse_captions=captions.sparse(content, _draws(seed, number, "sparse")),
        dense_caption=captions.dense(content, _draws(seed, number, "dense")),
    )


def plan(counts: dict[str, int], seed: int, size: int) -> Iterator[SceneEntry]:
    """The scenes of a data set, split by split.

    Each split has a range of numbers of its own that starts with a new family. So no family lies in two
    splits, and a larger training split leaves val and test as they were.

    Args:
        counts: scenes wanted in each of "train", "val" and "test".
        seed: the world's seed; the plan does not depend on it.
        size: pixels; the plan does not depend on it, but a size that `scene` would refuse is refused here.

    Raises:
        ValueError: for another split, or a count that is negative or larger than the split's range.
    """
    if size < 16:
        raise ValueError(f"scene size {size}: must be at least 16 pixels")
    for split, count in counts.items():
        if split not in SPLIT_STARTS:
            raise ValueError(f"split {split!r}: scenes have the splits {', '.join(SPLIT_STARTS)}")
        room = SPLIT_STOPS[split] - SPLIT_STARTS[split]
        if not 0 <= count <= room:
            raise ValueError(f"split {split!r}: {count} scenes wanted; give a number from 0 to {room}")
    return (
        SceneEntry(number, split, f"scene-{number:07d}")
        for split, start in SPLIT_STARTS.items()
        for number in range(start, start + counts.get(split, 0))
    )


def _draws(seed: int, number: int, purpose: str) -> random.Random:
    return random.Random(f"d2s scenes {seed} {number} {purpose}")
