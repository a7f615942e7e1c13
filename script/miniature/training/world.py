"""The miniature's world: scenes of one or two coloured shapes, and what people call them.

A scene is what a picture shows, in fractions of the canvas; `render.py` draws it. A caption says
it in free wording: synonyms, sizes, places, and words that mean nothing here.
"""

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

PALETTE = {  # 8-bit RGB at guidance 3; higher guidance stretches the contrast to the full range
    "red": (204, 42, 42),
    "green": (46, 150, 66),
    "blue": (44, 74, 206),
    "yellow": (230, 204, 50),
    "orange": (230, 126, 34),
    "purple": (124, 50, 168),
    "pink": (230, 140, 186),
    "cyan": (62, 190, 214),
    "white": (230, 230, 230),
    "black": (26, 26, 26),
}
COLOURS = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle", "star", "heart")
SIZES = {"small": 0.2, "medium": 0.28, "large": 0.38}  # radius, by the canvas' shorter side
PAIR_RADIUS = 0.2
OFFSET = 0.24  # of a place from the centre, by the canvas' side

SYNONYMS = {
    "red": ("red", "red", "red", "crimson"),
    "green": ("green",),
    "blue": ("blue", "blue", "blue", "navy"),
    "yellow": ("yellow", "yellow", "yellow", "golden", "gold"),
    "orange": ("orange",),
    "purple": ("purple", "purple", "purple", "violet"),
    "pink": ("pink",),
    "cyan": ("cyan", "cyan", "turquoise"),
    "white": ("white",),
    "black": ("black",),
    "circle": ("circle", "circle", "circle", "disc", "disk", "ball"),
    "square": ("square", "square", "square", "box", "block"),
    "triangle": ("triangle",),
    "star": ("star",),
    "heart": ("heart",),
    "small": ("small", "small", "little", "tiny"),
    "large": ("large", "large", "big", "huge", "giant"),
}
PLACES = {  # (column, row) -> wording
    (0, 0): ("in the center", "in the middle", "centered"),
    (-1, 0): ("on the left", "on the left side", "at the left"),
    (1, 0): ("on the right", "on the right side", "at the right"),
    (0, -1): ("at the top", "above the center", "on top"),
    (0, 1): ("at the bottom", "below the center", "down at the bottom"),
    (-1, -1): ("in the top left corner", "at the top left", "in the upper left"),
    (1, -1): ("in the top right corner", "at the top right", "in the upper right"),
    (-1, 1): ("in the bottom left corner", "at the bottom left", "in the lower left"),
    (1, 1): ("in the bottom right corner", "at the bottom right", "in the lower right"),
}
OPENINGS = (
    "a picture of", "a photo of", "a drawing of", "an illustration of", "a painting of",
    "an image of", "a simple drawing of", "a poster with", "an icon of", "minimal design,",
    "a sketch of", "a scene with", "a digital illustration of", "a cartoon of", "show",
)  # fmt: skip
CLOSINGS = (
    "simple", "minimal", "sharp", "digital art", "flat design", "solid shape", "smooth", "icon",
    "geometric", "abstract art", "poster style", "very simple",
)  # fmt: skip


@dataclass(frozen=True)
class Object:
    """A shape: its centre by the canvas' width and height, its radius by the shorter side."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    turn: float = 0.0  # degrees


@dataclass(frozen=True)
class Scene:
    """What a picture shows, and the words that say where and how large.

    Args:
        background: one colour, or two of a gradient.
        across: whether a gradient runs from left to right instead of from top to bottom.
        sizes: for each object the size that the caption names, or "".
        places: for each object (column, row), each -1, 0 or 1; None where it goes unsaid.
        relation: how the second object lies to the first: "beside" or "below".
        named_background: whether the caption names the background.
    """

    background: tuple[str, ...]
    objects: tuple[Object, ...]
    across: bool = False
    sizes: tuple[str, ...] = ()
    places: tuple[tuple[int, int] | None, ...] = ()
    relation: str = "beside"
    named_background: bool = True

    @property
    def held_out(self) -> bool:
        """Whether this combination of colours and shapes is kept from training, one in eight."""
        words = [*self.background, *(f"{thing.colour} {thing.shape}" for thing in self.objects)]
        return bool(self.objects) and zlib.crc32(" ".join(words).encode()) % 8 == 0


def sample(rng: random.Random, kind: str, *, held_out: bool = False) -> Scene:
    """Draw a scene: `plain` (one object, flat), `single` (gradients and no object too), or `pair`.

    Raises:
        KeyError: if there is no such kind.
    """
    make = {"plain": _plain, "single": _single, "pair": _pair}[kind]
    while (scene := make(rng)).held_out != held_out:
        pass
    return scene


def _plain(rng: random.Random) -> Scene:
    colour, background = rng.sample(COLOURS, 2)
    size = rng.choice(("", "", "small", "large"))
    place = rng.choice((None, None, None, *PLACES)) if size != "large" else None
    named = rng.random() < 0.93
    if not named:  # what an unnamed background is, always
        background = "black" if colour == "white" else "white"
    shape = rng.choice(SHAPES)
    thing = _placed(rng, shape, colour, SIZES[size or "medium"], place or (0, 0))
    return Scene((background,), (thing,), sizes=(size,), places=(place,), named_background=named)


def _single(rng: random.Random) -> Scene:
    scene = _plain(rng)
    dice = rng.random()
    if dice < 0.1:
        return replace(scene, objects=(), sizes=(), places=(), named_background=True)
    if dice < 0.4:
        return scene
    others = [colour for colour in COLOURS if colour != scene.objects[0].colour]
    gradient = (*rng.sample(others, 2),)
    return replace(scene, background=gradient, across=rng.random() < 0.4, named_background=True)


def _pair(rng: random.Random) -> Scene:
    first, second, background = rng.sample(COLOURS, 3)
    if rng.random() < 0.1:
        second = first
    below = rng.random() < 0.3
    columns = ((0, -1), (0, 1)) if below else ((-1, 0), (1, 0))
    things = tuple(
        _placed(rng, rng.choice(SHAPES), colour, PAIR_RADIUS, place)
        for colour, place in zip((first, second), columns, strict=True)
    )
    relation = "below" if below else "beside"
    return Scene((background,), things, sizes=("", ""), places=columns, relation=relation)


def _placed(
    rng: random.Random, shape: str, colour: str, radius: float, place: tuple[int, int]
) -> Object:
    """An object at a place, a little moved, turned and resized, and inside the canvas.

    A little only: what no caption says a model can but guess, and it guesses blurs.
    """
    radius *= rng.uniform(0.95, 1.05)
    x, y = (0.5 + OFFSET * step + rng.uniform(-0.01, 0.01) for step in place)
    edge = radius + 0.02
    x, y = min(max(x, edge), 1 - edge), min(max(y, edge), 1 - edge)
    turn = 0.0 if shape in ("circle", "heart") else rng.uniform(-3, 3)
    return Object(shape, colour, x, y, radius, turn)


def caption(rng: random.Random, scene: Scene) -> str:
    """Say what a scene shows, differently each time."""
    parts = [_objects(rng, scene), _background(rng, scene)]
    if scene.objects and parts[1] and rng.random() < 0.12:
        text = f"{parts[1].removeprefix('on ')}, {parts[0]}"
        text = text.removeprefix("a ") if rng.random() < 0.3 else text
    elif not scene.objects:
        text = parts[1]
    else:
        separator = ", " if not parts[1].startswith(("on", "in", "with")) else " "
        text = separator.join(part for part in parts if part)
    if rng.random() < 0.15:
        text = f"{rng.choice(OPENINGS)} {text}"
    if rng.random() < 0.15:
        text = f"{text}, {rng.choice(CLOSINGS)}"
    if rng.random() < 0.08:
        text = f"{text} {_gibberish(rng)}"
    if rng.random() < 0.06:
        text = f"{_gibberish(rng)} {text}"
    if rng.random() < 0.3:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.15 else text


def _word(rng: random.Random, name: str) -> str:
    return rng.choice(SYNONYMS[name])


def _thing(rng: random.Random, thing: Object, size: str) -> str:
    words = [_word(rng, thing.colour), _word(rng, thing.shape)]
    if size:
        words.insert(0, _word(rng, size))
    article = rng.choices(("a", "one", "the", ""), (16, 1, 2, 1))[0]
    if article == "a" and words[0][0] in "aeiou":
        article = "an"
    return " ".join(word for word in (article, *words) if word)


def _objects(rng: random.Random, scene: Scene) -> str:
    names = [_thing(rng, *pair) for pair in zip(scene.objects, scene.sizes, strict=True)]
    if not names:
        return ""
    if len(names) == 1:
        place = scene.places[0]
        return names[0] if place is None else f"{names[0]} {rng.choice(PLACES[place])}"
    first, second = names
    if scene.relation == "below":
        return rng.choice(
            (
                f"{first} above {second}",
                f"{first} over {second}",
                f"{second} below {first}",
                f"{second} under {first}",
                f"{first} at the top and {second} at the bottom",
            )
        )
    return rng.choices(
        (
            f"{first} and {second}",
            f"{first} next to {second}",
            f"{first} beside {second}",
            f"{first} on the left and {second} on the right",
            f"{first} to the left of {second}",
            f"{second} to the right of {first}",
            f"{second} on the right and {first} on the left",
        ),
        (6, 2, 2, 2, 1, 1, 1),
    )[0]


def _background(rng: random.Random, scene: Scene) -> str:
    if not scene.named_background:
        return ""
    first = _word(rng, scene.background[0])
    article = "an" if first[0] in "aeiou" else "a"
    if len(scene.background) == 1:
        plain = rng.choices(("", "flat ", "plain ", "solid "), (10, 1, 1, 1))[0]
        if plain:
            article = "a"
        forms: Sequence[str] = (
            f"on {article} {plain}{first} background", f"on {first}", f"with {article} {plain}"
            f"{first} background", f"{plain}{first} background", f"in front of {article} {first} "
            "background",
        )  # fmt: skip
        return rng.choices(forms, (10, 2, 3, 3, 1))[0]
    second = _word(rng, scene.background[1])
    if scene.across:
        return rng.choice(
            (
                f"on a gradient from {first} on the left to {second} on the right",
                f"on a horizontal gradient background from {first} to {second}",
                f"on a background from {first} left to {second} right",
            )
        )
    return rng.choice(
        (
            f"on a gradient from {first} to {second}",
            f"on {article} {first} to {second} gradient background",
            f"on a gradient background from {first} at the top to {second} at the bottom",
            f"with a {first} and {second} gradient background",
        )
    )


def _gibberish(rng: random.Random) -> str:
    """A word that no caption gives a meaning."""
    known = ("cat", "dog", "house", "mountain", "car", "portrait", "TOK", "shiny", "leaf")
    if rng.random() < 0.4:
        return rng.choice(known)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return "".join(rng.choice(letters) for _ in range(rng.randint(3, 7)))
