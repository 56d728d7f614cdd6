"""Defines claims about a scene. Every caption is written from claims. The tests check that all claims are true.

Claims are literal. "two red objects" is true if exactly two objects are red. A pattern without a texture fits
objects of every texture. "next to" means neighbouring places in one row.
"""

from dataclasses import dataclass

from d2s.shards.scenes.world import Thing


@dataclass(frozen=True)
class Pattern:
    """A partial description of one object. None stands for any value.

    `row` and `col` together name one of nine places. `row` or `col` alone names a third of the picture.
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
    """Claims that at least one object fits `pattern`."""

    pattern: Pattern


@dataclass(frozen=True)
class Ground:
    """Claims that the scene has the background `background`."""

    background: str


@dataclass(frozen=True)
class Number:
    """Claims that exactly `count` objects fit `pattern`."""

    pattern: Pattern
    count: int


@dataclass(frozen=True)
class Both:
    """Claims that one object fits `first`, another fits `second` and, if set, `relation` holds between them."""

    first: Pattern
    second: Pattern
    relation: str | None = None


Claim = Some | Ground | Number | Both


def related(a: Thing, relation: str, b: Thing) -> bool:
    """Returns whether `a` has the relation to `b`, judged by their places on the grid.

    Relations are the keys of `captions.RELATIONS`. "left" and "right" require the same row. "above" and "below"
    require the same column. "beside" requires neighbouring places in a row. If `a` and `b` have the same place, the
    small object is in front of the large object, and no other relation is true.
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
