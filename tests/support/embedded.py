"""diffusers' own pipelines, as the oracle."""

from functools import cache
from pathlib import Path

import torch
from diffusers import FluxPipeline

from flux.deployment import NANO
from miniature import checkpoint


@cache
def diffusers(
    dtype: torch.dtype = torch.float32, directory: Path = NANO
) -> dict[str, FluxPipeline]:
    """dev and schnell of a checkpoint, by default the embedded one, as diffusers loads them."""
    dev = FluxPipeline.from_pretrained(directory / "dev", dtype=dtype)
    shared = {name: dev.components[name] for name in checkpoint.SHARED}
    schnell = FluxPipeline.from_pretrained(directory / "schnell", dtype=dtype, **shared)
    return {"dev": dev, "schnell": schnell}
