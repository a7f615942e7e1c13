"""The VAE: 16 x 16 pixels to one latent position of 16 channels, and back."""

import logging
import random
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from miniature.pass_through import STRUCTURED
from miniature.training.render import Pixels, coverage, render
from miniature.training.stage import Stage
from miniature.training.world import SHAPES, sample

logger = logging.getLogger(__name__)

CROP, BATCH = 160, 8
STEPS, BALANCE_AT, RATE = 2300, 0.4, 5e-4
# These write into the stream that carries the picture; its norms make them far more sensitive.
SLOW = ("conv_in", "conv_out", "conv2", "to_out.0", "conv_shortcut", "samplers.0.conv")
NOISE = 0.12  # added to latents of unit variance: the decoder forgives what denoising leaves


def train(vae: AutoencoderKL, directory: Path, seed: int = 0) -> None:
    """Train in two parts, with the channels balanced between them; `vae` is changed in place."""
    vae.to(memory_format=torch.channels_last)
    hold_anchors(vae)
    first = round(STEPS * BALANCE_AT)
    for part, steps in (("vae-1", first), ("vae-2", STEPS - first)):
        stage = Stage(directory, part, {"vae": vae}, steps, RATE, slow=SLOW, decay=0.99)
        if part == "vae-2" and stage.step == 0:
            balance(vae, crops(random.Random(seed - 1), 32))
            stage = Stage(directory, part, {"vae": vae}, steps, RATE, slow=SLOW, decay=0.99)
        stage.run(partial(_loss, vae, f"{seed} {part}"))


def _loss(vae: AutoencoderKL, name: str, step: int) -> dict[str, Tensor]:
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor
    pictures = crops(random.Random(f"{name} {step}"), BATCH)
    with torch.autocast("cpu", torch.bfloat16):
        moments = vae.encoder(pictures)
        latents = (moments[:, : vae.config.latent_channels].float() - shift) * scale
        generator = torch.Generator().manual_seed(step)
        noise = torch.randn(latents.shape, generator=generator) * NOISE
        returned = vae.decoder((latents + noise) / scale + shift).float()
    difference = returned - pictures
    return {
        "l1": difference.abs().mean(),
        "l2": 4 * difference.square().mean(),
        "size": 2e-3 * latents.square().mean(),
    }


@torch.no_grad()
def balance(vae: AutoencoderKL, pictures: Tensor) -> None:
    """Bring the latents half the way to white: variance by direction to its square root.

    What a few channels carry strongly (flat colour) is decided at the very start of denoising, and
    what is weak (edges) at its end. The change of basis is written into the encoder's last and the
    decoder's first layer; latents have mean 0 and mean variance 1 after scale and shift.
    """
    channels, scale, shift = (
        vae.config.latent_channels, vae.config.scaling_factor, vae.config.shift_factor
    )  # fmt: skip
    latents = vae.encode(pictures).latent_dist.mean.movedim(1, -1).flatten(0, 2).double()
    mean = latents.mean(0)
    variances, directions = torch.linalg.eigh((latents - mean).T.cov())
    variances = variances.clamp(min=1e-4 * variances.max())
    gains = variances**-0.25
    gains /= (gains.square() * variances).mean().sqrt() * scale
    forward = (directions * gains) @ directions.T
    backward = (directions / gains) @ directions.T
    out, into = vae.encoder.conv_out, vae.decoder.conv_in
    weight = out.weight[:channels].double()
    out.weight[:channels] = torch.einsum("ij,jkhw->ikhw", forward, weight).float()
    out.bias[:channels] = (forward @ (out.bias[:channels].double() - mean) + shift).float()
    # z = backward (z' - shift) + mean; the padding of z' is 0, a flaw at the border alone
    kernel = into.weight.double()
    into.bias += torch.einsum("ojhw,j->o", kernel, mean - backward.sum(1) * shift).float()
    into.weight.copy_(torch.einsum("ojhw,ji->oihw", kernel, backward))


def crops(rng: random.Random, count: int, size: int = CROP) -> Tensor:
    """Pictures to compress, (count, RGB, size, size) in -1..1."""
    pictures = np.stack([_crop(rng, size) for _ in range(count)])
    return torch.from_numpy(pictures).movedim(-1, 1).contiguous(memory_format=torch.channels_last)


def _crop(rng: random.Random, size: int) -> Pixels:
    """Half from the world, at the scales of its pictures; half anything with flat parts."""
    if rng.random() < 0.5:
        scene = sample(rng, rng.choice(("plain", "single", "pair")))
        width, height = rng.choice(((256, 256), (384, 384), (512, 512), (672, 384), (384, 672)))
        picture = render(scene, width, height, rng.choice((3, 3, rng.uniform(0, 10))))
        left, top = rng.randrange(0, width - size + 1), rng.randrange(0, height - size + 1)
        picture = picture[top : top + size, left : left + size]
        return -picture if rng.random() < 0.15 else picture
    picture = _texture(rng, size, rng.choice((2, 2, 3, 6)))
    for _ in range(rng.randrange(5)):
        radius = rng.uniform(0.1, 0.9) * size
        x, y, turn = rng.uniform(0, size), rng.uniform(0, size), rng.uniform(0, 360)
        cover = coverage(rng.choice(SHAPES), x, y, radius, turn, size, size)
        if rng.random() < 0.25:  # a thick line about nothing
            cover = cover - coverage(
                "circle", x, y, radius * rng.uniform(0.4, 0.8), turn, size, size
            ).clip(0, cover)
        fill = _texture(rng, size, 2) if rng.random() < 0.2 else _flat(rng)
        picture = picture + cover[..., None] * (fill - picture)
    return picture.astype(np.float32)


def _flat(rng: random.Random) -> Pixels:
    return np.array([rng.uniform(-1, 1) for _ in range(3)], np.float32)


def _texture(rng: random.Random, size: int, points: int) -> Pixels:
    """A smooth field of colour through points x points random ones; mostly almost flat."""
    spread = rng.choice((0.0, 0.3, 1.0))
    middle = _flat(rng)
    grid = np.stack([middle + spread * _flat(rng) for _ in range(points * points)])
    grid = grid.clip(-1, 1).reshape(points, points, 3)
    planes = [
        Image.fromarray(grid[..., channel]).resize((size, size), Image.Resampling.BICUBIC)
        for channel in range(3)
    ]
    return np.stack([np.asarray(plane) for plane in planes], -1).clip(-1, 1)


@torch.no_grad()
def hold_anchors(vae: AutoencoderKL) -> None:
    """Let nothing learn to read or write the constant channels that steady the norms.

    They are far larger than what the other channels carry, so each step of a weight that reads
    them would shift a whole layer, and training at any useful rate would diverge.
    """
    anchors = slice(STRUCTURED - 2, STRUCTURED)
    for name, module in vae.named_modules():
        if not isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            continue
        reads = not name.endswith(("conv_in", "conv2", "to_out.0"))  # their inputs are not channels
        writes = name.endswith(("conv_in", "conv2", "to_out.0", "conv_shortcut", "samplers.0.conv"))
        passes = name.endswith(("conv_shortcut", "samplers.0.conv"))
        free = torch.ones_like(module.weight)
        if reads:
            free[:, anchors] = 0
        if writes:
            free[anchors] = 0
        if not passes and name.rpartition(".")[2] != "conv_in":
            module.weight.mul_(free)
        module.weight.register_hook(lambda grad, free=free: grad * free)
        if writes and module.bias is not None:
            kept = torch.ones_like(module.bias)
            kept[anchors] = 0
            if name.endswith(("conv2", "to_out.0")):
                module.bias.mul_(kept)
            module.bias.register_hook(lambda grad, kept=kept: grad * kept)
