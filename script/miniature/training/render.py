"""Pictures of scenes: anti-aliased, in linear steps of 8-bit RGB."""

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from miniature.training.world import PALETTE, Object, Scene

OVERSAMPLE = 3
Pixels = NDArray[np.float32]  # (height, width, RGB) in -1..1


def contrast(guidance: float) -> float:
    """What guidance does in this world: it stretches colours about mid grey, 0.45 to 1.27 times.

    1 at the default guidance of 3; steep below and gentle above it.
    """
    return 0.45 + 0.55 * guidance / 3 if guidance <= 3 else 1 + 0.27 * (guidance - 3) / 7


def colour(name: str, guidance: float = 3.0) -> Pixels:
    """A palette colour, RGB in -1..1."""
    rgb = np.array(PALETTE[name], np.float32) / 127.5 - 1
    return np.clip(rgb * contrast(guidance), -1, 1)


def render(scene: Scene, width: int, height: int, guidance: float = 3.0) -> Pixels:
    """Draw a scene."""
    picture = background(scene, width, height, guidance)
    for thing in scene.objects:
        cover = _cover(thing, width, height)[..., None]
        picture += cover * (colour(thing.colour, guidance) - picture)
    return picture


def background(scene: Scene, width: int, height: int, guidance: float = 3.0) -> Pixels:
    """A scene without its objects."""
    first, last = scene.background[0], scene.background[-1]
    length = width if scene.across else height
    ramp = np.linspace(0, 1, length, dtype=np.float32)[:, None]
    line = colour(first, guidance) * (1 - ramp) + colour(last, guidance) * ramp
    line = line[None] if scene.across else line[:, None]
    return np.broadcast_to(line, (height, width, 3)).copy()


def outline(shape: str) -> list[tuple[float, float]]:
    """A shape's corners (x to the right, y down) in a unit circle about its middle."""
    if shape == "circle":
        return [_at(0.95, 360 * step / 72) for step in range(72)]
    if shape == "square":
        return [_at(1.1, 45 + 90 * step) for step in range(4)]
    if shape == "triangle":
        return [(x, y + 0.2) for x, y in (_at(1.15, -90 + 120 * step) for step in range(3))]
    if shape == "star":
        return [_at((1.15, 0.56)[step % 2], -90 + 36 * step) for step in range(10)]
    if shape == "heart":
        return [_heart(2 * math.pi * step / 60) for step in range(60)]
    raise ValueError(f"no such shape: {shape}")


def coverage(
    shape: str, x: float, y: float, radius: float, turn: float, width: int, height: int
) -> Pixels:
    """How much of each pixel a shape covers, (height, width) in 0..1; centre and radius in pixels.

    Of a shape that reaches over an edge, the rest is drawn.
    """
    left, top = max(0, math.floor(x - 1.3 * radius)), max(0, math.floor(y - 1.3 * radius))
    right = min(width, math.ceil(x + 1.3 * radius) + 1)
    bottom = min(height, math.ceil(y + 1.3 * radius) + 1)
    cover = np.zeros((height, width), np.float32)
    if left >= right or top >= bottom:
        return cover
    box = Image.new("L", (OVERSAMPLE * (right - left), OVERSAMPLE * (bottom - top)))
    cosine, sine = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    corners = [
        (
            OVERSAMPLE * (x - left + radius * (cosine * u - sine * v)),
            OVERSAMPLE * (y - top + radius * (sine * u + cosine * v)),
        )
        for u, v in outline(shape)
    ]
    ImageDraw.Draw(box).polygon(corners, fill=255)
    cover[top:bottom, left:right] = np.asarray(box.reduce(OVERSAMPLE), np.float32) / 255
    return cover


def rim(thing: Object, width: int, height: int, inner: float) -> Pixels:
    """How much of each pixel lies on an object but outside of a smaller one, `inner` times it."""
    ring: Pixels = _cover(thing, width, height) - _cover(thing, width, height, inner)
    return ring.clip(0, 1)


def surroundings(thing: Object, width: int, height: int) -> Pixels:
    """How much of each pixel lies about an object's outline: in a disc around it, not deep inside.

    The disc, because what tells a star from a circle is where the star is not.
    """
    disc = _cover(replace(thing, shape="circle"), width, height, 1.25)
    around: Pixels = disc - _cover(thing, width, height, 0.75)
    return around.clip(0, 1)


def _cover(thing: Object, width: int, height: int, scale: float = 1.0) -> Pixels:
    """How much of each pixel an object covers, drawn `scale` times as large."""
    radius = scale * thing.radius * min(width, height)
    x, y = thing.x * width, thing.y * height
    return coverage(thing.shape, x, y, radius, thing.turn, width, height)


def _at(radius: float, degrees: float) -> tuple[float, float]:
    angle = math.radians(degrees)
    return radius * math.cos(angle), radius * math.sin(angle)


def _heart(t: float) -> tuple[float, float]:
    """The heart curve x = 16 sin³ t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, scaled."""
    x = 16 * math.sin(t) ** 3
    y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
    return x / 16, -(y + 2) / 15
