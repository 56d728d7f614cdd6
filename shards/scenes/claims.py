"""Claims about a scene. Every caption is written from claims, and the tests check that they are true.

Claims are meant literally. "two red objects" is true if exactly two are red. A pattern without a texture fits
every texture. "next to" means neighbouring places in one row.
"""

from dataclasses import dataclass

from d2s.shards.scenes.world import Thing


@dataclass(frozen=True)
class Pattern:
    """A partial description of one object. None stands for any value.

    `row` and `col` together name a place; one of them alone names a side.
    """

    shape: str | None = None
    colour: str | None = None
    texture: str | None = None
    size: str | None = None
    row: int | None = None
    col: int | None = None

    def fits(self, thing: Thing) -> bool:
        """Returns whether the object has all the attributes of this pattern."""
        return (
            self.shape in (None, thing.shape)
            and self.colour in (None, thing.colour)
            and self.texture in (None, thing.texture)
            and self.size in (None, thing.size)
            and self.row in (None, thing.row)
            and self.col in (None, thing.col)
        )


@dataclass(frozen=True)
class Some:
    """Claims that at least one object fits the pattern."""

    pattern: Pattern


@dataclass(frozen=True)
class Ground:
    """Claims that the scene has this background."""

    background: str


@dataclass(frozen=True)
class Number:
    """Claims that exactly `count` objects fit the pattern."""

    pattern: Pattern
    count: int


@dataclass(frozen=True)
class Both:
    """Claims that two different objects fit the two patterns and are in the relation, if one is given."""

    first: Pattern
    second: Pattern
    relation: str | None = None


Claim = Some | Ground | Number | Both


def related(a: Thing, relation: str, b: Thing) -> bool:
    """Returns whether `a` is in the relation to `b`, judged by their places on the grid.

    Relations are the keys of `captions.RELATIONS`. Left, right, above and below require the same row or
    column; beside requires neighbouring places in a row. If both have the same place, the small one is in
    front of the large one, and no other relation holds between them.
    """
    if a.cell == b.cell:
        return relation == {"small": "front", "large": "behind"}.get(a.size) and a.size != b.size
    return {
        "left": a.row == b.row and a.col < b.col,
        "right": a.row == b.row and a.col > b.col,
        "above": a.col == b.col and a.row < b.row,
        "below": a.col == b.col and a.row > b.row,
        "beside": a.row == b.row and abs(a.col - b.col) == 1,
        "front": False,
        "behind": False,
    }[relation]
