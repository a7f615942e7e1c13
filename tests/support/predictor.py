"""A predictor in this process, set up under a deployment's settings."""

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from flux.autoencoder import Autoencoder
from predict import Predictor
from tests.support.inputs import QUICK, SMALL
from tests.support.pictures import colours

SIZES = {"image", "aspect_ratio", "megapixels"}

Generate = Callable[..., list[Image.Image]]
"""A predictor's `run`, with the images in place of their files."""


def set_up_predictor(
    monkeypatch: pytest.MonkeyPatch, outputs: Path, **environment: str
) -> Generate:
    """Set up a predictor in this process; returns its `run` with QUICK's inputs, giving images.

    Images are as small as they may be, unless their size is given. go_fast takes no custom size: a
    small input picture sets it, in image to image at a strength of 1, which uses no more of it.
    """
    picture = outputs.with_name(f"{outputs.name}.png")
    colours(128, 128).save(picture)
    small = {False: SMALL, True: {"image": picture, "prompt_strength": 1.0}}
    settings = {
        "FLUX_CHECKPOINT": "nano",
        "FLUX_DEVICE": "cpu",
        "FLUX_OUTPUT_DIRECTORY": str(outputs),
        **environment,
    }
    for name in [name for name in os.environ if name.startswith("FLUX_")]:
        monkeypatch.delenv(name)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    predictor = Predictor()
    predictor.setup()

    def generate(**inputs: Any) -> list[Image.Image]:
        size = {} if inputs.keys() & SIZES else small[inputs.get("go_fast", False)]
        options = {**defaults(predictor.run), **QUICK, **size, "output_format": "png", **inputs}
        return [_load(path) for path in predictor.run(**options)]

    return generate


def without_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every image be black, without the VAE: for tests of transformers alone."""

    def decode(
        _: Autoencoder, latents: torch.Tensor, width: int, height: int, **__: object
    ) -> Image.Image:
        return Image.new("RGB", (width, height))

    monkeypatch.setattr(Autoencoder, "decode", decode)


def _load(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.copy()


def defaults(run: Any) -> dict[str, Any]:
    """The inputs that `Predictor.run` takes when a caller gives none."""
    parameters = inspect.signature(run).parameters
    return {name: p.default.default for name, p in parameters.items() if name != "self"}
