"""Encoding a megapixel as webp: time, size and error by the encoder's `method`.

`method` is 0 (fast) to 6 (small). At the contract's default quality, 80: a photograph, a picture
by the miniature, and noise.
"""

import base64
import io
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from benchmarks.shared.report import interleave, medians, parser, report
from miniature.evaluation.effects import psnr
from serving.server import Server

ROUNDS = 9
METHODS = range(7)
SIDE = 1024
QUALITY = 80


def main() -> None:
    file = parser().parse_args().json
    pictures = {"photograph": photograph(), "by the miniature": generated(), "noise": noise()}
    found: dict[str, dict[str, Any]] = {}
    for name, picture in pictures.items():
        contenders = {str(method): partial(encode, picture, method) for method in METHODS}
        median = medians(interleave(contenders, ROUNDS))
        found[name] = {}
        for method in METHODS:
            content = encode(picture, method)
            found[name][f"method {method}"] = {
                "ms": round(1000 * median[str(method)], 1),
                "kB": round(len(content) / 1000, 1),
                "PSNR dB": round(psnr(picture, decoded(content)), 2),
            }
    report(
        "encode",
        {"pixels": [SIDE, SIDE], "quality": QUALITY, "rounds": ROUNDS, "webp": found},
        file,
    )


def encode(picture: Image.Image, method: int) -> bytes:
    """The picture as webp."""
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=QUALITY, method=method)
    return buffer.getvalue()


def decoded(content: bytes) -> Image.Image:
    """An image file's picture, RGB."""
    with Image.open(io.BytesIO(content)) as found:
        return found.convert("RGB")


def photograph() -> Image.Image:
    """Grace Hopper, public domain, as matplotlib ships it."""
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    with Image.open(path) as found:
        return found.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def generated() -> Image.Image:
    """A red circle on a blue background."""
    inputs = {"prompt": "a red circle on a blue background", "output_format": "png", "seed": 1}
    with Server({"FLUX_CHECKPOINT": "nano"}) as server:
        (uri,) = server.predict(inputs)["output"]
    return decoded(base64.b64decode(uri.partition(",")[2]))


def noise() -> Image.Image:
    """The worst case: bytes without any structure."""
    values = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    return Image.fromarray(values)


if __name__ == "__main__":
    main()
