"""What the evaluation asks for: captions of held-out scenes, with fixed seeds and sizes."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from flux.sampling import ASPECT_RATIOS
from miniature.training.render import render
from miniature.training.world import Scene, caption, sample

SIZES = {  # name -> (aspect_ratio, megapixels)
    "512 x 512": ("1:1", "0.25"),
    "1024 x 1024": ("1:1", "1"),
    "672 x 384": ("16:9", "0.25"),
    "384 x 672": ("9:16", "0.25"),
}
SMALL = "512 x 512"
TURNS = (SMALL, "1024 x 1024", SMALL, "672 x 384", "384 x 672")  # the sizes of five cases


@dataclass(frozen=True)
class Case:
    """A scene that training never showed, its caption, and how it is to be rendered."""

    scene: Scene
    caption: str
    seed: int
    size: str

    @property
    def inputs(self) -> dict[str, Any]:
        """The inputs of the public contract."""
        aspect_ratio, megapixels = SIZES[self.size]
        return {
            "prompt": self.caption,
            "seed": self.seed,
            "aspect_ratio": aspect_ratio,
            "megapixels": megapixels,
        }

    def truth(self, guidance: float = 3.0) -> Image.Image:
        """The picture that the caption was made from."""
        return rendered(self.scene, self.size, guidance)


def cases(kind: str, count: int, sizes: Sequence[str] = (SMALL,)) -> list[Case]:
    """The first of an endless list, the same at every call; `kind` is as for `world.sample`."""
    return [_case(kind, number, sizes[number % len(sizes)]) for number in range(count)]


def _case(kind: str, number: int, size: str) -> Case:
    rng = random.Random(f"evaluation {kind} {number}")
    scene = sample(rng, kind, held_out=True)
    return Case(scene, caption(rng, scene), number, size)


def rendered(scene: Scene, size: str, guidance: float = 3.0) -> Image.Image:
    """A rendered scene as an 8-bit picture of one of SIZES."""
    aspect_ratio, megapixels = SIZES[size]
    width, height = ASPECT_RATIOS[aspect_ratio]
    half = 2 if megapixels == "0.25" else 1
    pixels = render(scene, width // half, height // half, guidance)
    return Image.fromarray(((pixels + 1) * 127.5).round().astype("uint8"))
