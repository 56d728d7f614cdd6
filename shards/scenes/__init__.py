"""Generates a data set: pictures of simple objects, each with five sparse captions and one dense caption.

The demo, the tests and the ablation use these scenes. They need no downloads. A caption states claims that can be
checked (`d2s.shards.scenes.claims`). So the properties of the data set can be measured.

A scene has four to six objects on a background. An object has a shape, a colour, a texture, a size and a place. The
dense caption names all objects. A sparse caption names one or two objects with some of their attributes, or the
number of similar objects, or an object and the background. Three properties decide how much a model can learn:

- *Families of similar scenes.* Five scenes with consecutive numbers share theme, background and most objects.
  Each scene differs from the first one by one or two edits. A sparse caption is often true of several scenes of
  a family. A dense caption is true of only one.
- *Themes.* Certain backgrounds, objects and attributes occur together (a dark sky, a yellow crescent, white
  stars). So a sparse caption contains information about objects that it does not name. Without themes, a model
  could not learn to predict the dense embedding from a sparse caption.
- *Points of view.* The five sparse captions of an image take turns over its objects. So they overlap little.

Constants at the top of `world` set how similar and how regular scenes are. Constants at the top of `captions`
set how many facts a caption states.

Captions say left and right. So train without horizontal flips, and with little cropping.
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
    """A scene with its content and its captions. `image` draws the picture each time it is called."""

    number: int
    seed: int
    size: int
    content: world.Content
    sparse_captions: tuple[captions.Caption, ...] = field(repr=False)
    dense_caption: captions.Caption = field(repr=False)

    @property
    def sparse(self) -> tuple[str, ...]:
        """The five sparse captions. Each is about a part of the scene."""
        return tuple(caption.text for caption in self.sparse_captions)

    @property
    def dense(self) -> tuple[str, ...]:
        """A tuple of the one dense caption, which is about the whole scene."""
        return (self.dense_caption.text,)

    def image(self) -> Image.Image:
        """Draws the picture, in RGB with `size` x `size` pixels."""
        return draw.render(self.content, self.size, _draws(self.seed, self.number, "picture"))

    def encoded(self) -> bytes:
        """Returns the picture as a JPEG file. The bytes depend only on the scene and on Pillow's version."""
        buffer = io.BytesIO()
        self.image().save(buffer, "JPEG", quality=95, subsampling=0)
        return buffer.getvalue()


def scene(number: int, seed: int, size: int) -> Scene:
    """Returns scene `number` of the world `seed`, to be drawn at `size` x `size` pixels.

    The result depends only on the arguments. `size` changes neither objects nor captions. Raises ValueError
    if `number` is negative or `size` is below 16 pixels.
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
    """Returns (number, split) for each scene of a data set, split by split.

    Each split has its own range of numbers, which starts with a new family. So no family is in two splits. A
    larger training split does not change val and test.

    Args:
        counts: maps "train", "val" and "test" to numbers of scenes. Missing splits get no scenes.
        size: width of the pictures in pixels. This function only checks it.

    Raises:
        ValueError: a split is unknown, a count is negative or too large, or `size` is below 16.
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
