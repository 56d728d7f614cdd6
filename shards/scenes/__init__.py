"""A procedural data set: pictures of simple objects, each with five sparse captions and a dense one.

The demo, the tests and the ablation use it. It needs no downloads, and every property of the data can be measured,
because a caption is written from claims that can be checked (`d2s.shards.scenes.claims`).

A scene has four to six objects (shape, colour, texture, size, place) on a background. The dense caption names them
all. A sparse caption names a part: one or two objects with some of their attributes, or the number of similar
objects, or an object and the background. Three structures decide what can be learned:

- *Families of similar scenes.* Five scenes with neighbouring numbers share theme, background and most objects,
  and differ by one or two edits. A sparse caption is often true of several of them, the dense caption of one.
- *Themes.* Certain backgrounds, objects and attributes occur together (a dark sky, a yellow crescent, white stars).
  So a sparse caption contains information about what it leaves out. Without themes, nothing could be learned by
  predicting the dense embedding from the sparse caption.
- *Points of view.* The five captions of an image take turns over its objects, so they overlap little.

Constants at the top of `world` set how similar and how regular scenes are; those at the top of `captions` set how
much a caption says.

Left and right matter in the captions: train without horizontal flips, and with little cropping.
"""

import io
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from PIL import Image

from d2s.shards.scenes import captions, draw, world

SPLIT_NUMBERS = {
    "train": range(8_000_000),
    "val": range(8_000_000, 9_000_000),
    "test": range(9_000_000, 10_000_000),
}


@dataclass(frozen=True)
class Scene:
    """A scene: its content and its captions. The picture is drawn on request."""

    number: int
    seed: int
    size: int
    content: world.Content
    sparse_captions: tuple[captions.Caption, ...] = field(repr=False)
    dense_caption: captions.Caption = field(repr=False)

    @property
    def sparse(self) -> tuple[str, ...]:
        """Five captions, each about a part of the scene."""
        return tuple(caption.text for caption in self.sparse_captions)

    @property
    def dense(self) -> tuple[str, ...]:
        """One caption about the whole scene."""
        return (self.dense_caption.text,)

    def image(self) -> Image.Image:
        """The picture, RGB, size x size pixels."""
        return draw.render(self.content, self.size, _draws(self.seed, self.number, "picture"))

    def encoded(self) -> bytes:
        """The picture as a JPEG file. The bytes depend on the version of Pillow only."""
        buffer = io.BytesIO()
        self.image().save(buffer, "JPEG", quality=95, subsampling=0)
        return buffer.getvalue()


def scene(number: int, seed: int, size: int) -> Scene:
    """Scene `number` of the world `seed`, to be drawn at `size` x `size` pixels.

    The result depends on the arguments alone. `size` changes neither objects nor captions.

    Raises:
        ValueError: the number is negative, or the size is below 16 pixels.
    """
    if number < 0:
        raise ValueError(f"scene number {number}: must not be negative")
    _check_size(size)
    content = world.content(seed, number)
    return Scene(
        number=number,
        seed=seed,
        size=size,
        content=content,
        sparse_captions=captions.sparse(content, _draws(seed, number, "sparse")),
        dense_caption=captions.dense(content, _draws(seed, number, "dense")),
    )


def scene_numbers(counts: dict[str, int], size: int) -> Iterator[tuple[int, str]]:
    """The numbers and splits of the scenes in a data set, split by split.

    Each split has its own range of numbers, which starts with a new family. So no family lies in two splits, and a
    larger training split leaves val and test as they were.

    Args:
        counts: number of scenes in each of "train", "val" and "test".
        size: pixels; only checked here.

    Raises:
        ValueError: another split, a count that is negative or beyond the range, or a size below 16 pixels.
    """
    _check_size(size)
    for split, count in counts.items():
        if split not in SPLIT_NUMBERS:
            raise ValueError(f"split {split!r}: scenes have the splits {', '.join(SPLIT_NUMBERS)}")
        most = len(SPLIT_NUMBERS[split])
        if not 0 <= count <= most:
            raise ValueError(f"split {split!r}: {count} scenes wanted; give a number from 0 to {most}")
    return (
        (number, split)
        for split, numbers in SPLIT_NUMBERS.items()
        for number in numbers[: counts.get(split, 0)]
    )


def _check_size(size: int) -> None:
    if size < 16:
        raise ValueError(f"scene size {size}: must be at least 16 pixels")


def _draws(seed: int, number: int, purpose: str) -> random.Random:
    return random.Random(f"d2s scenes {seed} {number} {purpose}")
