"""Pictures already compressed: latents of many scenes at several sizes, made once and kept.

Each shard follows from its name, so a pool can be made by several processes and grown later.
"""

import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from miniature.training.render import Pixels, render
from miniature.training.world import Scene, sample

logger = logging.getLogger(__name__)

SHARD = 128  # scenes
KINDS = ("plain", "plain", "single", "pair", "pair")  # by a scene's index
ENCODE = 4  # pictures at once
Size = tuple[int, int]  # width, height in pixels


@dataclass(frozen=True)
class Example:
    """A scene, the guidance it was drawn with, and its latents (channels, height, width)."""

    scene: Scene
    guidance: float
    latents: Tensor


def examples(size: Size, shard: int) -> list[tuple[Scene, float]]:
    """The scenes of a shard and their guidance: the default for a third, else 0 to 10."""
    rng = random.Random(f"{size} {shard}")
    return [
        (
            sample(rng, KINDS[index % len(KINDS)]),
            3.0 if rng.random() < 0.33 else rng.uniform(0, 10),
        )
        for index in range(SHARD)
    ]


def make(vae: AutoencoderKL, directory: Path, size: Size, shard: int) -> None:
    """Render and compress a shard, unless it is there."""
    path = _path(directory, size, shard)
    if path.is_file():
        return
    pictures = (render(scene, *size, guidance) for scene, guidance in examples(size, shard))
    latents = encode(vae, pictures).half()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(latents, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Iterable[Pixels]) -> Tensor:
    """Latents as the pipelines scale and shift them, (count, channels, height, width)."""
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor
    rows = []
    for batch in batched(pictures, ENCODE):
        pixels = torch.from_numpy(np.stack(batch)).movedim(-1, 1)
        with torch.autocast("cpu", torch.bfloat16):
            moments = vae.encoder(pixels.contiguous(memory_format=torch.channels_last))
        rows.append((moments[:, : vae.config.latent_channels].float() - shift) * scale)
    return torch.cat(rows)


def batched(items: Iterable[Pixels], size: int) -> Iterator[list[Pixels]]:
    """Lists of `size` items; the last may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


class Pool:
    """What has been made so far, read as it is needed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._shards: dict[tuple[Size, int], list[Example]] = {}

    def sample(
        self, rng: random.Random, size: Size, count: int, kinds: Sequence[str]
    ) -> list[Example]:
        """Some examples of a size, of the kinds named.

        Raises:
            FileNotFoundError: none of this size has been made.
        """
        paths = self._directory.glob(f"{size[0]}x{size[1]}-*.pt")
        made = sorted(int(path.stem.rpartition("-")[2]) for path in paths)
        if not made:
            raise FileNotFoundError(f"no latents of {size} in {self._directory}")
        wanted = [index for index in range(SHARD) if KINDS[index % len(KINDS)] in kinds]
        return [self._shard(size, rng.choice(made))[rng.choice(wanted)] for _ in range(count)]

    def _shard(self, size: Size, shard: int) -> list[Example]:
        if (size, shard) not in self._shards:
            latents = torch.load(_path(self._directory, size, shard), weights_only=True)
            self._shards[size, shard] = [
                Example(scene, guidance, row)
                for (scene, guidance), row in zip(examples(size, shard), latents, strict=True)
            ]
        return self._shards[size, shard]


def _path(directory: Path, size: Size, shard: int) -> Path:
    return directory / f"{size[0]}x{size[1]}-{shard:04d}.pt"
