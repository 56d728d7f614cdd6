"""Draws the pixels of a scene: a background at the final size, and each object on a small image of its own.

An object is drawn `SUPER` times larger, as polygons filled with a texture. Then it is scaled down and pasted
with its mask. So edges are smooth, and empty parts of the picture cost no time. `random.Random` jitters places,
angles and shades (see `d2s.shards.scenes.world`). Backgrounds use numpy's `RandomState`. Its sequence never changes,
so pictures do not depend on numpy's version.
"""

import math
import random
from collections.abc import Callable
from functools import lru_cache

import numpy
from PIL import Image, ImageDraw

from d2s.shards.scenes.world import Content, Thing

SUPER = 4
DIAMETER = {"small": 0.22, "medium": 0.29, "large": 0.37}
"""Width of an object of each size, as a fraction of the image's width."""
CENTRES = (0.2, 0.5, 0.8)
PALETTE = {
    "red": (214, 38, 44),
    "orange": (246, 128, 24),
    "yellow": (255, 224, 50),
    "green": (34, 150, 66),
    "blue": (34, 92, 214),
    "purple": (134, 58, 180),
    "pink": (250, 130, 186),
    "brown": (128, 78, 40),
    "black": (32, 32, 38),
    "white": (250, 250, 250),
}
SECOND = {"white": (128, 132, 142), "yellow": (150, 104, 10), "pink": (170, 34, 104), "orange": (132, 58, 4)}
"""The second colour of a texture if the first colour is one of these. For other colours it is nearly white."""

Contour = tuple[tuple[float, float], ...]


def _polar(radius: Callable[[float], float], count: int) -> Contour:
    """Returns `count` points of a closed curve, clockwise from the top. `radius` maps an angle to a radius."""
    turns = [2 * math.pi * i / count for i in range(count)]
    return tuple((radius(turn) * math.sin(turn), -radius(turn) * math.cos(turn)) for turn in turns)


def _crescent() -> Contour:
    outer = [math.radians(angle) for angle in range(50, 311, 10)]
    inner = [math.radians(angle) for angle in range(288, 71, -12)]
    left = [(0.15 + math.cos(angle), math.sin(angle)) for angle in outer]
    right = [(0.52 + 0.80 * math.cos(angle), 0.80 * math.sin(angle)) for angle in inner]
    return tuple(left + right)


def _heart() -> Contour:
    turns = [2 * math.pi * i / 40 for i in range(40)]
    return tuple(
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16 - 0.1,
        )
        for t in turns
    )


def _drop() -> Contour:
    arc = [math.radians(angle) for angle in range(-30, 211, 10)]
    return ((0.0, -1.05), *((0.68 * math.cos(angle), 0.32 + 0.68 * math.sin(angle)) for angle in arc))


CONTOURS: dict[str, tuple[Contour, ...]] = {
    "circle": (_polar(lambda turn: 0.92, 40),),
    "square": (((-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)),),
    "triangle": (((0.0, -0.95), (1.0, 0.8), (-1.0, 0.8)),),
    "star": (tuple(_polar(lambda turn: 1.08 if round(turn / math.pi * 5) % 2 == 0 else 0.46, 10)),),
    "cross": (
        (
            (-0.33, -0.95), (0.33, -0.95), (0.33, -0.33), (0.95, -0.33), (0.95, 0.33), (0.33, 0.33),
            (0.33, 0.95), (-0.33, 0.95), (-0.33, 0.33), (-0.95, 0.33), (-0.95, -0.33), (-0.33, -0.33),
        ),
    ),
    "ring": (_polar(lambda turn: 0.98, 40), _polar(lambda turn: 0.5, 28)),
    "heart": (_heart(),),
    "hexagon": (tuple((math.cos(k * math.pi / 3), math.sin(k * math.pi / 3)) for k in range(6)),),
    "crescent": (_crescent(),),
    "diamond": (((0.0, -1.08), (0.72, 0.0), (0.0, 1.08), (-0.72, 0.0)),),
    "flower": (_polar(lambda turn: 0.72 + 0.3 * math.cos(5 * turn), 60), _polar(lambda turn: 0.22, 14)),
    "drop": (_drop(),),
}  # fmt: skip
"""The outline of each shape. Coordinates are within about -1..1. y grows downwards. A second contour is a hole."""


def render(scene: Content, size: int, rng: random.Random) -> Image.Image:
    """Draws a scene as an RGB image of `size` x `size` pixels. Equal states of `rng` give equal images."""
    tile = _background(scene.background, size, int(rng.random() * 4))
    if rng.random() < 0.5:
        tile = tile.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    light = 0.94 + 0.12 * rng.random()
    picture = tile.point([min(255, int(value * light)) for value in range(256)] * 3)
    rank = {"large": 0, "medium": 1, "small": 2}
    for thing in sorted(scene.things, key=lambda thing: (rank[thing.size], thing.cell)):
        _paste(picture, scene, thing, size, rng)
    return picture


def _paste(picture: Image.Image, scene: Content, thing: Thing, size: int, rng: random.Random) -> None:
    in_front = thing.size == "small" and scene.crowded(thing)
    shift = 0.075 if in_front else 0.0
    x, y = (
        CENTRES[place] + 0.03 * (2 * rng.random() - 1) + shift * (1 if rng.random() < 0.5 else -1)
        for place in (thing.col, thing.row)
    )
    diameter = DIAMETER[thing.size] * (0.94 + 0.12 * rng.random())
    tilt = math.radians(16 * (rng.random() - 0.5))
    colour = tuple(max(0, min(255, c + int(20 * (rng.random() - 0.5)))) for c in PALETTE[thing.colour])

    half = 0.5 * diameter * size
    side = math.ceil(2.3 * half) + 2
    left, top = math.floor(x * size - side / 2), math.floor(y * size - side / 2)
    mask, fill = _patch(thing, colour, side, (x * size - left, y * size - top), half, tilt)
    drop = max(1, round(0.012 * size))
    shadow = mask.point([value * 2 // 5 for value in range(256)])
    picture.paste((20, 20, 30), (left + drop, top + drop), shadow)
    picture.paste(fill, (left, top), mask)


def _patch(
    thing: Thing,
    colour: tuple[int, ...],
    side: int,
    centre: tuple[float, float],
    half: float,
    tilt: float,
) -> tuple[Image.Image, Image.Image]:
    """Returns an object's mask (L) and colours (RGB), `side` x `side` pixels each. half: its radius in pixels."""
    x, y, half = centre[0] * SUPER, centre[1] * SUPER, half * SUPER
    cos, sin = half * math.cos(tilt), half * math.sin(tilt)
    outlines = [
        [(x + cos * u - sin * v, y + sin * u + cos * v) for u, v in contour]
        for contour in CONTOURS[thing.shape]
    ]
    big = (side * SUPER, side * SUPER)
    mask, fill = Image.new("L", big, 0), Image.new("RGB", big, colour)
    cut, brush = ImageDraw.Draw(mask), ImageDraw.Draw(fill)
    cut.polygon(outlines[0], fill=255)
    for hole in outlines[1:]:
        cut.polygon(hole, fill=0)
    _texture(brush, thing, (x, y), half)
    edge = tuple(int(c * 0.55) for c in colour) if thing.colour != "black" else (120, 120, 128)
    for outline in outlines:
        brush.line([*outline, *outline[:2]], fill=edge, width=max(2, round(0.16 * half)), joint="curve")
    return mask.reduce(SUPER), fill.reduce(SUPER)


def _texture(brush: ImageDraw.ImageDraw, thing: Thing, centre: tuple[float, float], half: float) -> None:
    """Draws the texture of an object. The period is half the radius, but at least 4 pixels of the final image."""
    if thing.texture == "plain":
        return
    second = SECOND.get(thing.colour, (248, 248, 248))
    x, y = centre
    step = max(0.5 * half, 4 * SUPER)
    cells = range(-3, 4)
    if thing.texture == "striped":
        for i in cells:
            brush.line(
                (x + (i - 1.3) * step, y + 2 * half, x + (i + 1.3) * step, y - 2 * half),
                fill=second,
                width=round(0.42 * step),
            )
    elif thing.texture == "dotted":
        radius = 0.27 * step
        for i in cells:
            for j in cells:
                u, v = x + (i + 0.5 * (j % 2)) * step, y + j * 0.9 * step
                brush.ellipse((u - radius, v - radius, u + radius, v + radius), fill=second)
    else:
        for i in cells:
            for j in cells:
                if (i + j) % 2:
                    u, v = x + i * step, y + j * step
                    brush.rectangle((u, v, u + step, v + step), fill=second)


@lru_cache(maxsize=64)
def _background(name: str, size: int, variant: int) -> Image.Image:
    """Returns picture `variant` (0 to 3) of a background. Do not change the picture, because it is cached."""
    noise = numpy.random.RandomState(variant)
    fine = noise.randint(-1000, 1001, (size, size, 1)) / 1000
    coarse = _smooth(noise.randint(-1000, 1001, (7, 7)) / 1000, size)[..., None]
    down = numpy.linspace(0, 1, size)[:, None, None]
    rows, cols = (
        numpy.arange(size)[:, None, None] * 64 // size,
        numpy.arange(size)[None, :, None] * 64 // size,
    )
    painted = {
        "sky": lambda: _blend((120, 185, 240), (205, 232, 250), down) + 30 * numpy.clip(coarse - 0.1, 0, 0.6),
        "grass": lambda: _blend((118, 178, 78), (92, 156, 58), down) + 13 * fine + 14 * coarse,
        "sand": lambda: _blend((232, 208, 160), (222, 190, 134), down) + 8 * fine + 10 * coarse,
        "night": lambda: _blend((18, 20, 54), (44, 46, 92), down) + 150 * (fine > 0.992),
        "paper": lambda: (
            _blend((244, 240, 226), (244, 240, 226), down)
            - numpy.array([46, 26, 4]) * ((rows + 4 * variant) % 10 == 5)
        ),
        "brick": lambda: _bricks(rows + 3 * variant, cols + 5 * variant) + 6 * fine + 6 * coarse,
        "sea": lambda: _blend((70, 170, 190), (30, 120, 160), down) + 26 * _waves(rows, cols, variant),
        "snow": lambda: (
            _blend((226, 236, 246), (246, 250, 252), down) - 16 * numpy.clip(coarse, 0, 1) + 4 * fine
        ),
    }[name]()
    return Image.fromarray(numpy.clip(painted, 0, 255).astype(numpy.uint8))


def _blend(top: tuple[int, int, int], bottom: tuple[int, int, int], down: numpy.ndarray) -> numpy.ndarray:
    """Returns a vertical colour gradient of shape (size, size, 3). down: 0 (top) to 1, of shape (size, 1, 1)."""
    size = down.shape[0]
    rows = numpy.array(top) * (1 - down) + numpy.array(bottom) * down
    return numpy.broadcast_to(rows, (size, size, 3))


def _smooth(values: numpy.ndarray, size: int) -> numpy.ndarray:
    """Interpolates a coarse grid of values bilinearly to an array of shape (size, size)."""
    return numpy.asarray(Image.fromarray(values.astype(numpy.float32)).resize((size, size), Image.BILINEAR))


def _bricks(rows: numpy.ndarray, cols: numpy.ndarray) -> numpy.ndarray:
    course = rows // 8
    shifted = cols + 8 * (course % 2)
    mortar = (rows % 8 == 0) | (shifted % 16 == 0)
    shade = ((course * 7 + shifted // 16 * 5) % 4)[..., 0:1] * 6.0
    brick = numpy.array([176, 112, 92]) + shade
    return numpy.where(mortar, numpy.array([206, 194, 180]), brick)


def _waves(rows: numpy.ndarray, cols: numpy.ndarray, variant: int) -> numpy.ndarray:
    """Returns an array that is 1 on the crests of zigzag waves and 0 elsewhere."""
    rise = numpy.abs((cols + 3 * variant) % 12 - 6) // 2
    return ((rows + rise) % 11 == 4).astype(float)
