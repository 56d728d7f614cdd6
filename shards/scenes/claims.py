"""Claims about a scene, from which every caption is written. The tests check that they are true.

Claims are meant literally: "two red objects" is true where exactly two are red; a pattern without a texture fits
every texture; "next to" means neighbouring places of one row.
"""

from dataclasses import dataclass

from d2s.shards.scenes.world import Thing


@dataclass(frozen=True)
class Pattern:
    """A partial description of one thing; None stands for any value.

    `row` and `col` may be given together (a place) or alone (a side).
    """

    shape: str | None = None
    colour: str | None = None
    texture: str | None = None
    size: str | None = None
    row: int | None = None
    col: int | None = None

    def fits(self, thing: Thing) -> bool:
        """Whether the thing has all the attributes of this pattern."""
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
    """At least one thing fits."""

    pattern: Pattern


@dataclass(frozen=True)
class Ground:
    """The scene has this background."""

    background: str


@dataclass(frozen=True)
class Number:
    """Exactly `count` things fit."""

    pattern: Pattern
    count: int


@dataclass(frozen=True)
class Both:
    """Two different things fit the two patterns and, if a relation is given, stand in it."""

    first: Pattern
    second: Pattern
    relation: str | None = None


Claim = Some | Ground | Number | Both


def related(a: Thing, relation: str, b: Thing) -> bool:
    """Whether `a` stands in the relation (a key of `captions.RELATIONS`) to `b`, judged by their places on the grid.

    Left, right, above and below require the same row or column; beside requires neighbours in a row. Of two things at
    one place the small one is in front, and no other relation holds between them.
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
