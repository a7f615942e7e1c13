"""What a picture of the miniature's world shows, read from its pixels and nothing else.

No training: colours are named by the nearest of the palette in CIELAB, and a shape by the overlap
of its mask with templates. `script/miniature/evaluate` first measures the measure on renders.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from miniature.training.render import Pixels, coverage
from miniature.training.world import COLOURS, PALETTE, SHAPES

SIDE = 128  # pixels: the shorter side at which a picture is looked at; averages noise away
BORDER = 0.04  # of the shorter side: where the background is looked for
FLAT = 2  # pixels: how far from a pixel the colour must have the same name for it to count
LEAST_SHARE = 0.004  # of the picture: a smaller flat area of a colour does not count as shown
LEAST_IOU = 0.75  # a mask that overlaps less with every template is no shape
TURNS = range(-15, 16, 5)  # degrees
STRETCH = 1.15  # a side of an object may be so much longer than it should be
GRID, REACH = 64, 3.2  # cells of a template, and the standard deviations that it reaches

Picture = Image.Image | Pixels  # an array is (height, width, RGB) in -1..1
Colours = NDArray[np.float64]  # (..., RGB) or (..., CIELAB)
Names = NDArray[np.uint8]  # indices into COLOURS
Mask = NDArray[np.bool_]  # (height, width)


@dataclass(frozen=True)
class Measurement:
    """What a picture with at most one object shows.

    Attributes:
        background, colour: names of the palette; the object's is None where there is none.
        shape: None where there is no object, or it resembles no shape.
        mask: where the object is, in the picture's proportions, SIDE pixels high or wide.
    """

    background: str
    colour: str | None
    shape: str | None
    mask: Mask


def measure(picture: Picture) -> Measurement:
    """Read a picture of one object on a flat background."""
    pixels = _thumbnail(picture)
    lab = cielab(pixels)
    around = np.median(_border(pixels), axis=0)
    background = COLOURS[_nearest(cielab(around))]
    names = _nearest(lab)
    flat = _flat(names)
    shares = {name: share for name, share in _shares(names, flat).items() if name != background}
    colour = max(shares, key=shares.__getitem__, default=None)
    if colour is None:
        return Measurement(background, None, None, np.zeros(names.shape, bool))
    inside = np.median(lab[flat & (names == COLOURS.index(colour))], axis=0)
    mask = _without_specks(_distance(lab, inside) < _distance(lab, cielab(around)))
    return Measurement(background, colour, _shape(mask), mask)


def colours(picture: Picture) -> dict[str, float]:
    """The share of a picture that each of its colours covers, the blurred edges left out."""
    names = _nearest(cielab(_thumbnail(picture)))
    return _shares(names, _flat(names))


def halves(picture: Image.Image, relation: str) -> tuple[Image.Image, Image.Image]:
    """The halves of a picture of two objects: left and right if "beside", else top and bottom."""
    width, height = picture.size
    if relation == "beside":
        middle = width // 2
        return picture.crop((0, 0, middle, height)), picture.crop((middle, 0, width, height))
    middle = height // 2
    return picture.crop((0, 0, width, middle)), picture.crop((0, middle, width, height))


def hollow(measurement: Measurement) -> float:
    """The share of the object's middle where the background shows: 0 for a filled shape.

    The middle is a disc about the mask's centroid, of half its root mean square radius: it lies
    inside every shape, and inside the hole of every ring that is not thicker than its hole.
    """
    if measurement.colour is None:
        return 0.0
    y, x = np.nonzero(measurement.mask)
    radius = 0.5 * math.sqrt(x.var() + y.var())
    rows, columns = np.indices(measurement.mask.shape)
    middle = (rows - y.mean()) ** 2 + (columns - x.mean()) ** 2 <= max(radius, 1.0) ** 2
    return float(1 - measurement.mask[middle].mean())


def cielab(rgb: Colours) -> Colours:
    """CIELAB (D65) of sRGB in 0..255; IEC 61966-2-1 and CIE 15."""
    encoded = np.asarray(rgb, np.float64) / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    matrix = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = linear @ np.array(matrix).T / np.array([0.9505, 1.0, 1.089])
    root = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    x, y, z = np.moveaxis(root, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def _thumbnail(picture: Picture) -> Colours:
    """(height, width, RGB) in 0..255, the shorter side SIDE pixels."""
    if not isinstance(picture, Image.Image):
        eight_bit = ((picture.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)
        picture = Image.fromarray(eight_bit)
    scale = SIDE / min(picture.size)
    size = round(picture.width * scale), round(picture.height * scale)
    small = picture.convert("RGB").resize(size, Image.Resampling.BILINEAR)
    return np.asarray(small, np.float64)


def _border(pixels: Colours) -> Colours:
    """The pixels along the four sides, (pixels, RGB)."""
    width = round(BORDER * SIDE)
    inner = np.zeros(pixels.shape[:2], bool)
    inner[width:-width, width:-width] = True
    return pixels[~inner]


def _nearest(lab: Colours) -> Names:
    """The nearest colours of the palette, (...) indices; by |a - b|² without |a|², halved."""
    palette = cielab(np.array(list(PALETTE.values()), np.float64))
    nearness = lab @ palette.T - np.square(palette).sum(-1) / 2
    nearest: Names = nearness.argmax(-1).astype(np.uint8)
    return nearest


def _distance(one: Colours, other: Colours) -> Colours:
    """The colour difference of 1976 (CIE76), the Euclidean distance in CIELAB."""
    return np.asarray(np.linalg.norm(one - other, axis=-1))


def _shares(names: Names, flat: Mask) -> dict[str, float]:
    """What share of all pixels is flat and of a colour, for those that are shown."""
    counts = np.bincount(names[flat], minlength=len(PALETTE)) / names.size
    shares = zip(PALETTE, counts.tolist(), strict=True)
    return {name: share for name, share in shares if share >= LEAST_SHARE}


def _flat(names: Names) -> Mask:
    """Where all pixels around have the same name: a blurred edge passes through other colours."""
    image, size = Image.fromarray(names), 2 * FLAT + 1
    least = np.asarray(image.filter(ImageFilter.MinFilter(size)))
    most = np.asarray(image.filter(ImageFilter.MaxFilter(size)))
    return np.asarray(least == most)


def _without_specks(mask: Mask) -> Mask:
    image = Image.fromarray(mask.astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.MedianFilter(5))) > 0


def _shape(mask: Mask) -> str | None:
    """The shape whose template overlaps most."""
    if mask.mean() < LEAST_SHARE:
        return None
    found = _normalised(mask)
    overlaps = {shape: max(map(_iou_with(found), _templates(shape))) for shape in SHAPES}
    best = max(overlaps, key=overlaps.__getitem__)
    return best if overlaps[best] >= LEAST_IOU else None


def _iou_with(mask: Mask) -> Callable[[Mask], float]:
    return lambda other: float((mask & other).sum() / (mask | other).sum())


def _normalised(mask: Mask) -> Mask:
    """A mask moved to its centroid, and scaled to unit standard deviation along both axes.

    The two scales may differ by STRETCH each: more is not the same shape, but two, or a bar.
    """
    y, x = np.nonzero(mask)
    mean = math.sqrt(max(x.std() * y.std(), 1.0))
    columns, rows = (
        np.linspace(-REACH, REACH, GRID) * np.clip(axis.std(), mean / STRETCH, mean * STRETCH)
        + axis.mean()
        for axis in (x, y)
    )
    height, width = mask.shape
    inside = np.outer((rows > 0) & (rows < height - 0.5), (columns > 0) & (columns < width - 0.5))
    rows, columns = rows.round().clip(0, height - 1), columns.round().clip(0, width - 1)
    return inside & mask[np.ix_(rows.astype(int), columns.astype(int))]


@cache
def _templates(shape: str) -> tuple[Mask, ...]:
    """A shape at every turn, normalised as a mask is."""
    radius = SIDE / 3
    return tuple(
        _normalised(coverage(shape, SIDE / 2, SIDE / 2, radius, turn, SIDE, SIDE) > 0.5)
        for turn in TURNS
    )
