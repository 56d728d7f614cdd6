"""Writes the captions of a scene: five sparse captions from several points of view, and one dense caption.

For each caption, the claims (`d2s.shards.scenes.claims`) are drawn first. Then templates and synonyms are drawn,
which give its words. `SAID` has the probabilities that a sparse caption mentions an attribute. Higher values make
captions more informative and retrieval easier.
"""

import random
from dataclasses import dataclass

from d2s.shards.scenes.claims import Both, Claim, Ground, Number, Pattern, Some, related
from d2s.shards.scenes.world import Content, Thing, pick, shuffled

SAID = {"shape": 0.95, "colour": 0.85, "texture": 0.45, "size": 0.4}
"""For each attribute of an object, the probability that a sparse caption mentions it."""
SPARSE_WORDS = (8, 14)
VIEWS = ("place", "ground", "relation", "relation", "count")
"""The points of view of an image's five sparse captions. Their order is shuffled for each image."""

NOUNS = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "plus sign"),
    "ring": ("ring", "hoop"),
    "heart": ("heart",),
    "hexagon": ("hexagon",),
    "crescent": ("crescent", "moon"),
    "diamond": ("diamond", "kite"),
    "flower": ("flower", "blossom"),
    "drop": ("drop", "teardrop"),
}
PLURALS = {"cross": "crosses", "box": "boxes"}
VAGUE = ("shape", "object", "thing")
TEXTURES = {
    "plain": ("plain",),
    "striped": ("striped", "stripy"),
    "dotted": ("dotted", "spotted"),
    "checked": ("checked", "checkered"),
}
SIZES = {"small": ("small", "little"), "medium": ("medium", "mid-sized"), "large": ("large", "big")}
PLACES = {
    (0, 0): ("in the top left corner", "at the upper left"),
    (0, 1): ("at the top in the middle", "at the top centre"),
    (0, 2): ("in the top right corner", "at the upper right"),
    (1, 0): ("at the left edge halfway down", "in the middle of the left side"),
    (1, 1): ("in the centre", "in the very middle"),
    (1, 2): ("at the right edge halfway down", "in the middle of the right side"),
    (2, 0): ("in the bottom left corner", "at the lower left"),
    (2, 1): ("at the bottom in the middle", "at the bottom centre"),
    (2, 2): ("in the bottom right corner", "at the lower right"),
}
ROWS = (("near the top", "in the upper part"), ("halfway up",), ("near the bottom", "in the lower part"))
COLUMNS = (
    ("on the left", "on the left side"),
    ("in the middle column",),
    ("on the right", "on the right side"),
)
GROUNDS = {
    "sky": ("in a blue sky", "against the bright sky"),
    "grass": ("on green grass", "on a grassy meadow"),
    "sand": ("on yellow sand", "on a sandy beach"),
    "night": ("in a dark night sky", "against the dark night"),
    "paper": ("on a sheet of lined paper", "on a page of paper"),
    "brick": ("on a brick wall", "in front of a wall of bricks"),
    "sea": ("on the sea", "on blue water with waves"),
    "snow": ("on white snow", "on a snowy field"),
}
RELATIONS = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "higher up than"),
    "below": ("below", "under"),
    "beside": ("next to", "beside"),
    "front": ("in front of", "partly covering"),
    "behind": ("behind", "partly hidden by"),
}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
PICTURE = ("the picture", "the image", "this scene")


@dataclass(frozen=True)
class Caption:
    """A caption and its claims. All claims are true of the scene that the caption describes."""

    text: str
    claims: tuple[Claim, ...]
    things: tuple[Thing, ...]
    """The objects that the caption is about."""


def _a(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _name(rng: random.Random, pattern: Pattern, plural: bool = False) -> str:
    """Returns `pattern` in words without an article, such as "large striped red star"."""
    words = []
    if pattern.size:
        words.append(pick(rng, SIZES[pattern.size]))
    if pattern.texture:
        words.append(pick(rng, TEXTURES[pattern.texture]))
    if pattern.colour:
        words.append(pattern.colour)
    noun = pick(rng, NOUNS[pattern.shape] if pattern.shape else VAGUE)
    words.append(PLURALS.get(noun, f"{noun}s") if plural else noun)
    return " ".join(words)


def _partial(rng: random.Random, thing: Thing, least: int = 1) -> Pattern:
    """Draws at least `least` attributes of `thing`, with shape or colour. A plain texture is rarely drawn."""
    while True:
        said = {name: rng.random() < chance for name, chance in SAID.items()}
        if thing.texture == "plain":
            said["texture"] = said["texture"] and rng.random() < 0.2
        if (said["shape"] or said["colour"]) and sum(said.values()) >= least:
            return Pattern(**{name: getattr(thing, name) for name, yes in said.items() if yes})


def sparse(scene: Content, rng: random.Random) -> tuple[Caption, ...]:
    """Returns five sparse captions, one for each entry of VIEWS.

    A caption is about one or two objects, or about the number of similar objects. The captions take turns over
    the objects, so that they describe different parts of the image.
    """
    turns = shuffled(rng, scene.things)
    views = shuffled(rng, VIEWS)
    return tuple(_worded(rng, scene, turns[i % len(turns)], view) for i, view in enumerate(views))


def _worded(rng: random.Random, scene: Content, thing: Thing, view: str) -> Caption:
    """Draws captions from the point of view `view` until the number of words is within SPARSE_WORDS."""
    low, high = SPARSE_WORDS
    while True:
        caption = {"place": _place, "ground": _ground, "relation": _relation, "count": _count}[view](
            rng, scene, thing
        )
        if low <= len(caption.text.split()) <= high:
            return caption


def _place(rng: random.Random, scene: Content, thing: Thing) -> Caption:
    pattern = _partial(rng, thing, least=2)
    name = _a(_name(rng, pattern))
    side = rng.random()
    if side < 0.5:
        where, row, col = pick(rng, PLACES[thing.cell]), thing.row, thing.col
    elif side < 0.75:
        where, row, col = pick(rng, ROWS[thing.row]), thing.row, None
    else:
        where, row, col = pick(rng, COLUMNS[thing.col]), None, thing.col
    text = pick(
        rng,
        (
            f"there is {name} {where}",
            f"{name} can be seen {where}",
            f"{where} of {pick(rng, PICTURE)} there is {name}",
            f"{pick(rng, PICTURE)} shows {name} {where}",
            f"{where} you can see {name}",
        ),
    )
    placed = Pattern(pattern.shape, pattern.colour, pattern.texture, pattern.size, row, col)
    return Caption(_sentence(text), (Some(placed),), (thing,))


def _ground(rng: random.Random, scene: Content, thing: Thing) -> Caption:
    """Describes the background and either one object, or two objects without their relation."""
    where = pick(rng, GROUNDS[scene.background])
    ground = Ground(scene.background)
    if rng.random() < 0.6:
        other = pick(rng, [other for other in scene.things if other is not thing])
        first, second = _partial(rng, thing), _partial(rng, other)
        name = f"{_a(_name(rng, first))} and {_a(_name(rng, second))}"
        text = pick(rng, (f"{where} there are {name}", f"{name} {where}", f"{name} can be seen {where}"))
        return Caption(_sentence(text), (Both(first, second), ground), (thing, other))
    pattern = _partial(rng, thing, least=2)
    name = _a(_name(rng, pattern))
    text = pick(
        rng,
        (
            f"there is {name} {where}",
            f"{name} {where} among other things",
            f"{pick(rng, PICTURE)} shows {name} {where}",
            f"{where} there is {name}",
            f"someone has put {name} {where}",
        ),
    )
    return Caption(_sentence(text), (Some(pattern), ground), (thing,))


def _relation(rng: random.Random, scene: Content, thing: Thing) -> Caption:
    """Describes two objects and their relation. If `thing` has no relation, only states that both exist."""
    options = [
        (relation, other)
        for relation in RELATIONS
        for other in scene.things
        if other is not thing and related(thing, relation, other)
    ]
    first = _partial(rng, thing)
    if not options:
        other = pick(rng, [other for other in scene.things if other is not thing])
        second = _partial(rng, other)
        a, b = _a(_name(rng, first)), _a(_name(rng, second))
        text = pick(rng, (f"there are both {a} and {b}", f"{pick(rng, PICTURE)} has {a} and also {b}"))
        return Caption(_sentence(text), (Both(first, second),), (thing, other))
    covering = [option for option in options if option[0] in ("front", "behind")]
    relation, other = pick(rng, covering if covering and rng.random() < 0.6 else options)
    second = _partial(rng, other)
    a, b, how = _a(_name(rng, first)), _a(_name(rng, second)), pick(rng, RELATIONS[relation])
    text = pick(
        rng, (f"{a} is {how} {b}", f"there is {a} {how} {b}", f"{a} {how} {b}", f"{how} {b} there is {a}")
    )
    return Caption(_sentence(text), (Both(first, second, relation),), (thing, other))


def _count(rng: random.Random, scene: Content, thing: Thing) -> Caption:
    """States how many objects share an attribute, and one more fact. If possible, `thing` has the attribute."""
    groups = []
    for name in ("colour", "shape", "texture", "size"):
        for value in sorted({getattr(other, name) for other in scene.things}):
            pattern = Pattern(**{name: value})
            things = tuple(other for other in scene.things if pattern.fits(other))
            if 2 <= len(things) < len(scene.things):
                groups.append((pattern, things))
    wanted = [group for group in groups if thing in group[1]] or groups
    telling = [group for group in wanted if group[0].colour or group[0].shape] or wanted
    if not telling:
        return _ground(rng, scene, thing)
    pattern, things = pick(rng, telling)
    name = f"{NUMBERS[len(things)]} {_name(rng, pattern, plural=True)}"
    claims: tuple[Claim, ...] = (Number(pattern, len(things)),)
    if rng.random() < 0.5 and (pattern.colour or pattern.shape):
        where = pick(rng, GROUNDS[scene.background])
        text = pick(
            rng, (f"{name} can be seen {where}", f"there are {name} {where}", f"{where} there are {name}")
        )
        return Caption(_sentence(text), (*claims, Ground(scene.background)), things)
    other = pick(rng, [other for other in scene.things if other not in things])
    extra = _partial(rng, other)
    one, whole = _a(_name(rng, extra)), pick(rng, PICTURE)
    text = pick(
        rng,
        (
            f"{whole} shows {name} and {one}",
            f"there are {name} and also {one}",
            f"{one} and {name} lie in {whole}",
        ),
    )
    return Caption(_sentence(text), (*claims, Some(extra)), (*things, other))


def dense(scene: Content, rng: random.Random) -> Caption:
    """Describes the background, the number of objects, the attributes and places of each object, and all overlaps."""
    number = NUMBERS[len(scene.things)]
    where = pick(rng, GROUNDS[scene.background])
    opening = pick(
        rng,
        (
            f"{pick(rng, PICTURE)} shows {number} objects {where}",
            f"there are {number} shapes {where}",
            f"{number} things can be seen {where}",
        ),
    )
    sentences, claims = [_sentence(opening)], [Ground(scene.background), Number(Pattern(), len(scene.things))]
    for thing in shuffled(rng, scene.things):
        text, claim = _full(rng, thing)
        sentences.append(_sentence(text))
        claims.append(claim)
    for front, rear in scene.overlapping():
        one, two = Pattern(front.shape, front.colour), Pattern(rear.shape, rear.colour)
        how = pick(rng, RELATIONS["front"])
        sentences.append(_sentence(f"the {_name(rng, one)} is {how} the {_name(rng, two)}"))
        claims.append(Both(one, two, "front"))
    return Caption(" ".join(sentences), tuple(claims), scene.things)


def _full(rng: random.Random, thing: Thing) -> tuple[str, Claim]:
    texture = None if thing.texture == "plain" and rng.random() < 0.7 else thing.texture
    pattern = Pattern(thing.shape, thing.colour, texture, thing.size, thing.row, thing.col)
    name, where = _a(_name(rng, pattern)), pick(rng, PLACES[thing.cell])
    return pick(rng, (f"{name} is {where}", f"{where} there is {name}", f"{where} is {name}")), Some(pattern)
