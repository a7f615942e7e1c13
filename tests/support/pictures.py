"""Pictures: made, encoded, and compared."""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def data_uri(content: bytes | Image.Image) -> str:
    if isinstance(content, Image.Image):
        content = encode(content)
    return f"data:application/octet-stream;base64,{base64.b64encode(content).decode()}"


def colours(width: int, height: int, shift: int = 0) -> Image.Image:
    """A smooth RGB picture without two equal rows or columns."""
    x = np.linspace(0, 255, width)[None, :].repeat(height, 0)
    y = np.linspace(255, 0, height)[:, None].repeat(width, 1)
    z = (x + y + shift) % 256
    return Image.fromarray(np.stack([x, y, z], -1).astype(np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=np.int16)


def difference(a: Image.Image, b: Image.Image) -> float:
    """Mean absolute difference of 8-bit pixels."""
    return float(np.abs(pixels(a) - pixels(b)).mean())


def largest_difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(pixels(a) - pixels(b)).max())


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.size == b.size and bool((pixels(a) == pixels(b)).all())
