"""Defines themes: backgrounds, objects and attributes that occur together. `world.py` draws scenes from themes.

Through themes, a caption contains information about objects that it does not name.
"""

from dataclasses import dataclass

HIDDEN = {
    "sky": ("blue",),
    "grass": ("green",),
    "sand": ("yellow", "orange"),
    "night": ("black", "brown", "blue"),
    "paper": ("white",),
    "brick": ("red", "brown"),
    "sea": ("blue", "green"),
    "snow": ("white",),
}
"""Maps each background to colours that can hardly be seen there. Its objects never have these colours."""


@dataclass(frozen=True)
class Kind:
    """An object of a theme with its usual attributes. If `row` is -1, the object may stand in any row."""

    shape: str
    colour: str
    texture: str
    size: str
    row: int = -1


@dataclass(frozen=True)
class Theme:
    """A theme. `grounds` has its usual and its second background. `pairs` has indices of objects in `cast`."""

    grounds: tuple[str, str]
    cast: tuple[Kind, ...]
    pairs: tuple[tuple[int, int], ...]


THEMES = {
    "night": Theme(
        ("night", "snow"),
        (
            Kind("crescent", "yellow", "plain", "large", 0),
            Kind("star", "white", "plain", "small", 0),
            Kind("star", "yellow", "dotted", "medium", 1),
            Kind("ring", "purple", "plain", "large", 1),
            Kind("circle", "orange", "striped", "medium", 2),
            Kind("diamond", "pink", "plain", "small"),
        ),
        ((0, 1), (3, 4), (2, 5)),
    ),
    "meadow": Theme(
        ("grass", "sky"),
        (
            Kind("flower", "red", "plain", "medium", 2),
            Kind("flower", "yellow", "dotted", "small", 2),
            Kind("heart", "pink", "plain", "medium", 1),
            Kind("circle", "yellow", "plain", "large", 0),
            Kind("drop", "blue", "striped", "small", 1),
            Kind("hexagon", "brown", "checked", "large"),
        ),
        ((0, 1), (3, 4), (2, 5)),
    ),
    "beach": Theme(
        ("sand", "sea"),
        (
            Kind("star", "red", "dotted", "medium", 2),
            Kind("ring", "red", "striped", "large", 1),
            Kind("circle", "blue", "striped", "large", 0),
            Kind("drop", "white", "plain", "small", 1),
            Kind("crescent", "brown", "plain", "medium", 2),
            Kind("heart", "pink", "dotted", "small"),
        ),
        ((0, 4), (1, 3), (2, 5)),
    ),
    "kites": Theme(
        ("sky", "grass"),
        (
            Kind("diamond", "red", "checked", "large", 0),
            Kind("diamond", "green", "striped", "medium", 1),
            Kind("triangle", "purple", "plain", "medium", 0),
            Kind("heart", "red", "plain", "small", 1),
            Kind("circle", "yellow", "plain", "large", 0),
            Kind("cross", "black", "plain", "small", 2),
        ),
        ((0, 3), (1, 2), (4, 5)),
    ),
    "desk": Theme(
        ("paper", "brick"),
        (
            Kind("triangle", "green", "plain", "medium", 2),
            Kind("square", "blue", "checked", "large", 1),
            Kind("cross", "red", "plain", "medium", 0),
            Kind("hexagon", "orange", "dotted", "medium", 1),
            Kind("star", "black", "plain", "small", 0),
            Kind("ring", "brown", "plain", "small", 2),
        ),
        ((0, 1), (2, 4), (3, 5)),
    ),
    "street": Theme(
        ("brick", "paper"),
        (
            Kind("square", "white", "checked", "large", 0),
            Kind("heart", "black", "plain", "large", 1),
            Kind("cross", "green", "plain", "medium", 0),
            Kind("triangle", "yellow", "striped", "medium", 2),
            Kind("ring", "blue", "plain", "small", 1),
            Kind("drop", "purple", "dotted", "medium", 2),
        ),
        ((0, 2), (1, 5), (3, 4)),
    ),
    "harbour": Theme(
        ("sea", "sand"),
        (
            Kind("triangle", "white", "striped", "large", 1),
            Kind("ring", "orange", "plain", "small", 2),
            Kind("hexagon", "red", "plain", "medium", 2),
            Kind("crescent", "black", "plain", "large", 2),
            Kind("circle", "yellow", "plain", "medium", 0),
            Kind("flower", "white", "plain", "small"),
        ),
        ((0, 3), (1, 2), (4, 5)),
    ),
    "winter": Theme(
        ("snow", "night"),
        (
            Kind("triangle", "green", "dotted", "large", 1),
            Kind("star", "yellow", "plain", "small", 0),
            Kind("hexagon", "blue", "plain", "small", 0),
            Kind("circle", "red", "plain", "medium", 2),
            Kind("square", "purple", "striped", "medium", 2),
            Kind("flower", "pink", "checked", "medium"),
        ),
        ((0, 1), (3, 4), (2, 5)),
    ),
}
