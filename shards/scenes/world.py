"""Draws the content of a scene: theme, background and objects. Other modules draw its pixels and words.

A `Content` has a background and four to six `Thing`s (objects) on a grid of 3 x 3 places. All draws use the
method `random()` of `random.Random(text)`. Python guarantees the sequence of this method between versions. So
(seed, number) gives the same content on every machine.

Scenes are regular in two ways (`d2s.shards.scenes` gives the reasons):

- **Themes** (`d2s.shards.scenes.themes`): one part of a scene contains information about the other parts.
  `DEVIATION` says how often an attribute of an object is unusual for the theme. `OFF_THEME` says how often the
  object itself is unusual.
- **Families**: `FAMILY` scenes with consecutive numbers share theme, background and most objects. Each scene
  differs from the first scene of the family by one or two edits (`TWO_EDITS`).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

from d2s.shards.scenes.themes import HIDDEN, THEMES, Kind

T = TypeVar("T")

SHAPES = (
    "circle", "square", "triangle", "star", "cross", "ring", "heart", "hexagon", "crescent", "diamond",
    "flower", "drop",
)  # fmt: skip
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEXTURES = ("plain", "striped", "dotted", "checked")
SIZES = ("small", "medium", "large")

FAMILY = 5
"""Number of scenes in a family. Larger families make sparse captions more ambiguous."""
TWO_EDITS = 0.5
"""Probability that a scene differs from the first scene of its family by two edits instead of one edit."""
COUNTS = {4: 0.3, 5: 0.4, 6: 0.3}
"""Maps each possible number of objects in a scene to its probability."""
OFF_THEME = 0.12
"""Probability that an object does not belong to the theme."""
PAIRED = 0.8
"""Probability that a scene contains one of its theme's pairs of objects."""
OTHER_GROUND = 0.15
"""Probability that a scene has the second background of its theme."""
OVERLAP = 0.4
"""Probability that a small object stands in front of a large one."""
DEVIATION = {"colour": 0.2, "texture": 0.25, "size": 0.35, "row": 0.25}
"""For each attribute of an object, the probability that it is not the usual attribute of the theme."""


@dataclass(frozen=True)
class Thing:
    """An object. `row` and `col`, 0 to 2 from the top left, are its place.

    If two objects have the same place, one object is large. The other object is small and stands in front.
    """

    shape: str
    colour: str
    texture: str
    size: str
    row: int
    col: int

    @property
    def cell(self) -> tuple[int, int]:
        """The place as (row, col)."""
        return self.row, self.col


@dataclass(frozen=True)
class Content:
    """The theme, the background and the objects of a scene."""

    theme: str
    background: str
    things: tuple[Thing, ...]

    def overlapping(self) -> list[tuple[Thing, Thing]]:
        """Returns the pairs (front, rear) of objects that have the same place."""
        return [
            (front, rear)
            for front in self.things
            for rear in self.things
            if front.cell == rear.cell and front.size == "small" and rear.size == "large"
        ]

    def crowded(self, thing: Thing) -> bool:
        """Returns whether another object has the same place."""
        return sum(other.cell == thing.cell for other in self.things) > 1


def pick(rng: random.Random, options: Sequence[T]) -> T:
    """Draws one of `options`. All have the same probability."""
    return options[int(rng.random() * len(options))]


def pick_weighted(rng: random.Random, weights: dict[T, float]) -> T:
    """Draws one of the keys of `weights`. The probability of a key is proportional to its value."""
    left = rng.random() * sum(weights.values())
    for option, weight in weights.items():
        left -= weight
        if left < 0:
            return option
    return option


def shuffled(rng: random.Random, items: Sequence[T]) -> list[T]:
    """Returns `items` in random order."""
    return [item for _, item in sorted(((rng.random(), item) for item in items), key=lambda pair: pair[0])]


def content(seed: int, number: int) -> Content:
    """Returns the content of scene `number` in world `seed`."""
    return _family(seed, number // FAMILY)[number % FAMILY]


@lru_cache(maxsize=64)
def _family(seed: int, family: int) -> tuple[Content, ...]:
    """Returns the scenes of a family, all different. Edits of the first scene make the other scenes."""
    rng = random.Random(f"d2s scenes {seed} family {family}")
    members = [_first(rng)]
    seen = {_signature(members[0])}
    while len(members) < FAMILY:
        member = members[0]
        for _ in range(1 + (rng.random() < TWO_EDITS)):
            member = _edited(rng, member)
        if _signature(member) not in seen:
            seen.add(_signature(member))
            members.append(member)
    return tuple(members)


def _signature(scene: Content) -> frozenset[Thing]:
    return frozenset(scene.things)


def _first(rng: random.Random) -> Content:
    theme_name = pick(rng, tuple(THEMES))
    theme = THEMES[theme_name]
    ground = theme.grounds[rng.random() < OTHER_GROUND]
    order = shuffled(rng, range(len(theme.cast)))
    if rng.random() < PAIRED:
        pair = pick(rng, theme.pairs)
        order = [*pair, *(kind for kind in order if kind not in pair)]
    kinds = [theme.cast[kind] for kind in order[: pick_weighted(rng, COUNTS)]]
    scene = Content(theme_name, ground, ())
    for kind in kinds:
        scene = replace(scene, things=(*scene.things, _placed(rng, scene, kind)))
    return _overlapped(rng, scene) if rng.random() < OVERLAP else scene


def _placed(rng: random.Random, scene: Content, kind: Kind) -> Thing:
    """Draws an object that resembles `kind`, at a free place."""
    taken = {thing.cell for thing in scene.things}
    free = [(row, col) for row in range(3) for col in range(3) if (row, col) not in taken]
    row = -1 if rng.random() < DEVIATION["row"] else kind.row
    cell = pick(rng, [cell for cell in free if cell[0] == row] or free)
    return _thing(rng, scene, kind, cell)


def _thing(rng: random.Random, scene: Content, kind: Kind, cell: tuple[int, int]) -> Thing:
    seen = [colour for colour in COLOURS if colour not in HIDDEN[scene.background]]
    if rng.random() < OFF_THEME:
        return Thing(pick(rng, SHAPES), pick(rng, seen), pick(rng, TEXTURES), pick(rng, SIZES), *cell)
    keep = {name: rng.random() >= DEVIATION[name] for name in ("colour", "texture", "size")}
    usual = sorted({other.colour for other in THEMES[scene.theme].cast if other.colour in seen})
    colour = kind.colour if keep["colour"] and kind.colour in seen else pick(rng, usual)
    texture = kind.texture if keep["texture"] else pick(rng, TEXTURES)
    return Thing(kind.shape, colour, texture, kind.size if keep["size"] else pick(rng, SIZES), *cell)


def _overlapped(rng: random.Random, scene: Content) -> Content:
    """Returns `scene` with one object moved in front of another object, unless both have the same colour."""
    first, second = shuffled(rng, range(len(scene.things)))[:2]
    rear, front = replace(scene.things[first], size="large"), replace(scene.things[second], size="small")
    if rear.colour == front.colour:
        return scene
    front = replace(front, row=rear.row, col=rear.col)
    changed = {first: rear, second: front}
    return replace(scene, things=tuple(changed.get(i, thing) for i, thing in enumerate(scene.things)))


def _edited(rng: random.Random, scene: Content) -> Content:
    """Returns `scene` with one object changed, or with the places of two objects exchanged."""
    while True:
        i, j = shuffled(rng, range(len(scene.things)))[:2]
        old, things = scene.things[i], list(scene.things)
        edit = pick(rng, ("colour", "colour", "shape", "texture", "size", "swap", "swap", "kind", "kind"))
        if edit == "swap":
            things[i] = replace(old, row=things[j].row, col=things[j].col)
            things[j] = replace(things[j], row=old.row, col=old.col)
        elif edit == "kind":
            things[i] = _thing(rng, scene, pick(rng, THEMES[scene.theme].cast), old.cell)
        else:
            options = {"colour": COLOURS, "shape": SHAPES, "texture": TEXTURES, "size": SIZES}[edit]
            things[i] = replace(old, **{edit: pick(rng, options)})
        result = replace(scene, things=tuple(things))
        if _signature(result) != _signature(scene) and _legible(result):
            return result


def _legible(scene: Content) -> bool:
    """Returns whether each object can be distinguished from the background and from an object at its place."""
    if any(thing.colour in HIDDEN[scene.background] for thing in scene.things):
        return False
    pairs = scene.overlapping()
    if any(front.colour == rear.colour for front, rear in pairs):
        return False
    cells = {thing.cell for thing in scene.things}
    return len(cells) + len(pairs) == len(scene.things)
