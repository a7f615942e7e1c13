"""Geometry and schedules as pure functions over numbers."""

import math

GRID = 16  # pixels: the contract's sizes, and FLUX's, are multiples of this
LONGEST_SIDE = 1440  # pixels
MEGAPIXEL = 1024 * 1024  # pixels; what "1" stands for

# The contract's sizes at one megapixel, width x height; "0.25" halves both sides.
ASPECT_RATIOS = {
    "1:1": (1024, 1024),
    "16:9": (1344, 768),
    "21:9": (1536, 640),
    "3:2": (1216, 832),
    "2:3": (832, 1216),
    "4:5": (896, 1088),
    "5:4": (1088, 896),
    "3:4": (896, 1152),
    "4:3": (1152, 896),
    "9:16": (768, 1344),
    "9:21": (640, 1536),
}


def nearest_multiple(length: float) -> int:
    """The multiple of 16 nearest to a length in pixels, halves up, and at least 16."""
    return max(GRID, math.floor(length / GRID + 0.5) * GRID)


def fit_size(width: int, height: int, *, quarter: bool) -> tuple[int, int]:
    """The output size for an input image: scaled down as far as the limits ask, never up.

    Neither side passes 1440 pixels, nor with `quarter` the area a quarter megapixel, before
    both sides are rounded to the nearest multiple of 16.
    """
    scale = min(1.0, LONGEST_SIDE / width, LONGEST_SIDE / height)
    if quarter:
        scale = min(scale, math.sqrt(MEGAPIXEL / 4 / (width * height)))
    return nearest_multiple(width * scale), nearest_multiple(height * scale)


def sigmas(steps: int, strength: float = 1.0) -> list[float]:
    """The noise levels at which the steps start, before the variant's shift.

    The first equals the strength, so every number of steps starts from the share of noise
    that was asked for; diffusers instead skips whole steps of the full schedule, where four
    steps at 0.8 start from pure noise. At strength 1 this is diffusers' own schedule,
    linspace(1, 1 / steps, steps).
    """
    count = max(1, round(steps * strength))
    return [strength * (1 - step / count) for step in range(count)]
