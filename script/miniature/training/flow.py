"""The transformer: rectified flow on the latents of the pool's scenes, dev and then schnell."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from miniature.training.pool import Example, Pool, Size
from miniature.training.render import surroundings
from miniature.training.stage import Stage
from miniature.training.text import tokens
from miniature.training.world import SIZES, Scene, caption

TEXT_LENGTH = 48  # the last of them stands for all the padding up to the pipelines' length
PADDED_LENGTHS = (512, 512, 256, 48)
EMPTY = 0.04  # share of captions that say nothing
RATE, DECAY = 1e-3, 0.998

# Dev's first part learns layout, on pictures that grow. A table: sizes and how many at once.
FIRST_STEPS = 4000
FIRST, LAST = 0.35, 0.78  # shares of the steps after which pictures grow
PLAIN_UNTIL = 0.15  # share of the steps in which simple scenes come first
SMALL: dict[Size, int] = {(256, 256): 40, (352, 192): 40, (192, 352): 40, (384, 384): 20}
MIDDLE: dict[Size, int] = {(512, 512): 16, (672, 384): 16, (384, 672): 16, (384, 384): 20}
LARGE: dict[Size, int] = {(1024, 1024): 4}

# The second learns shapes, at the sizes that people ask for: how many at once, and how often.
SECOND_STEPS = 29000
OFTEN: dict[Size, tuple[int, int]] = {
    (256, 256): (64, 1), (512, 512): (16, 3), (672, 384): (16, 3), (384, 672): (16, 3),
    (1024, 1024): (4, 12),
}  # fmt: skip
RIMS = 3.0  # weight of what lies about an outline, beside 1: most of a picture is flat
TOKEN = 4  # subdivisions of a token by which it is found whether it lies there

SCHNELL_STEPS, SCHNELL_RATE = 400, 2e-4
SCHNELL_TIMES = (1.0, 0.75, 0.5, 0.25)


@dataclass(frozen=True)
class TextEncoders:
    """Both encoders with their tokenizers, frozen."""

    clip: CLIPTextModel
    clip_tokenizer: CLIPTokenizer
    t5: T5EncoderModel
    t5_tokenizer: T5Tokenizer

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Pooled (batch, width) and sequence (batch, TEXT_LENGTH, width), padding at its end."""
        pooled = self.clip(tokens(self.clip_tokenizer, texts, TEXT_LENGTH)).pooler_output
        ids = tokens(self.t5_tokenizer, texts, TEXT_LENGTH)
        hidden = self.t5(torch.cat([ids, torch.zeros_like(ids[:1])])).last_hidden_state
        sequence = hidden[:-1].clone()
        sequence[:, -1] = hidden[-1, TEXT_LENGTH // 2]
        return pooled, sequence


def sizes_at(rng: random.Random, progress: float) -> tuple[Size, int]:
    """The size of a step's pictures (width, height) and their number: small ones first."""
    dice = rng.random()
    if progress < FIRST:
        table = SMALL
    elif progress < LAST:
        table = MIDDLE if dice < 0.85 else SMALL if dice < 0.95 else LARGE
    else:
        table = MIDDLE if dice < 0.5 else LARGE if dice < 0.9 else SMALL
    return rng.choice(list(table.items()))


def asked_size(rng: random.Random) -> tuple[Size, int]:
    """The same once layout is learned: the sizes that people ask for."""
    shares = [share for _, share in OFTEN.values()]
    size, (count, _) = rng.choices(list(OFTEN.items()), shares)[0]
    return size, count


@dataclass(frozen=True)
class Times:
    """How times in 0..1 (noise at 1) are sampled: shares of noise alone and of little else."""

    noise: float
    early: float
    since: float  # where "little else" begins

    def shifted(self, size: Size) -> "Times":
        """The same signal to noise at another size than 512 x 512; Esser et al. 2024, eq. 23."""
        shift = math.sqrt(size[0] * size[1]) / 512
        since = shift * self.since / (1 + (shift - 1) * self.since)
        return replace(self, since=since)

    def sample(self, generator: torch.Generator, count: int) -> Tensor:
        """Times (count); those in no share are anywhere."""
        uniform, dice = torch.rand(2, count, generator=generator)
        early = self.since + (1 - self.since) * uniform
        where = torch.where(dice < self.early, early, uniform)
        return torch.where((1 - dice) < self.noise, torch.ones(count), where)


LAYOUT = Times(noise=0.04, early=0.3, since=0.85)  # colour and layout are decided there
OUTLINES = Times(noise=0.1, early=0.7, since=0.75)  # and the outlines, down to there


def train(
    transformer: FluxTransformer2DModel,
    text: TextEncoders,
    pool: Pool,
    directory: Path,
    seed: int = 0,
) -> None:
    """Train dev in place, in its two parts."""
    quiet_start(transformer)
    modules = {"transformer": transformer}
    stage = Stage(directory, "dev-1", modules, FIRST_STEPS, RATE, decay=DECAY)

    def first(step: int) -> dict[str, Tensor]:
        rng = random.Random(f"{seed} dev {step}")
        size, count = sizes_at(rng, step / FIRST_STEPS)
        early = step < PLAIN_UNTIL * FIRST_STEPS and rng.random() < 0.7
        kinds = ("plain",) if early else ("plain", "single", "pair")
        batch = pool.sample(rng, size, count, kinds)
        generator = torch.Generator().manual_seed(step)
        when = LAYOUT.sample(generator, count)
        return {"flow": flow_loss(transformer, text, batch, rng, when, generator)}

    stage.run(first)
    stage = Stage(directory, "dev-2", modules, SECOND_STEPS, RATE, decay=DECAY)

    def second(step: int) -> dict[str, Tensor]:
        rng = random.Random(f"{seed} dev-2 {step}")
        size, count = asked_size(rng)
        batch = pool.sample(rng, size, count, ("plain", "single", "pair"))
        generator = torch.Generator().manual_seed(step)
        when = OUTLINES.shifted(size).sample(generator, count)
        loss = flow_loss(transformer, text, batch, rng, when, generator, rims=RIMS)
        return {"flow": loss}

    stage.run(second)


def train_schnell(
    transformer: FluxTransformer2DModel,
    text: TextEncoders,
    pool: Pool,
    directory: Path,
    seed: int = 0,
) -> None:
    """Train schnell, which begins as dev at guidance 3, at the four times that it generates at."""
    modules = {"transformer": transformer}
    stage = Stage(directory, "schnell", modules, SCHNELL_STEPS, SCHNELL_RATE, decay=0.99)

    def loss(step: int) -> dict[str, Tensor]:
        rng = random.Random(f"{seed} schnell {step}")
        size, count = asked_size(rng)
        batch: list[Example] = []
        while len(batch) < count:
            found = pool.sample(rng, size, count, ("plain", "single", "pair"))
            batch += [example for example in found if example.guidance == 3.0]
        generator = torch.Generator().manual_seed(step)
        when = torch.tensor([rng.choice(SCHNELL_TIMES) for _ in range(count)])
        batch = batch[:count]
        return {"flow": flow_loss(transformer, text, batch, rng, when, generator, rims=RIMS)}

    stage.run(loss)


@torch.no_grad()
def quiet_start(transformer: FluxTransformer2DModel) -> None:
    """Zero the modulations and the output: every block begins as the identity, as in DiT."""
    for name, module in transformer.named_modules():
        if (isinstance(module, torch.nn.Linear) and "norm" in name) or name == "proj_out":
            module.weight.zero_()
            module.bias.zero_()


@torch.no_grad()
def fold_guidance(
    dev: FluxTransformer2DModel, schnell: FluxTransformer2DModel, guidance: float = 3.0
) -> None:
    """Copy dev into schnell, with one value of the guidance embedding as a bias: exactly dev."""
    embed = dev.time_text_embed
    value = embed.guidance_embedder(embed.time_proj(torch.tensor([1000 * guidance])))[0]
    weights = {k: v for k, v in dev.state_dict().items() if ".guidance_embedder." not in k}
    schnell.load_state_dict(weights)
    schnell.time_text_embed.timestep_embedder.linear_2.bias += value


def flow_loss(
    transformer: FluxTransformer2DModel,
    text: TextEncoders,
    batch: Sequence[Example],
    rng: random.Random,
    when: Tensor,
    generator: torch.Generator,
    suffix: str = "",
    rims: float = 0.0,
) -> Tensor:
    """Mean squared error of the velocity, noise - picture, at the given times (batch).

    What lies about the outlines weighs `rims` more than the rest. A caption says (but for a little
    that is left to chance) where that is, so what is learned for it is the same.
    """
    latents = torch.stack([example.latents for example in batch]).float()
    height, width = (side // 2 for side in latents.shape[-2:])
    picture = latents.unflatten(-1, (width, 2)).unflatten(-3, (height, 2))
    # (batch, channels, rows, 2, columns, 2) -> (batch, rows x columns, channels x 2 x 2)
    picture = picture.permute(0, 2, 4, 1, 3, 5).flatten(1, 2).flatten(2)
    noise = torch.randn(picture.shape, generator=generator)
    texts = ["" if rng.random() < EMPTY else caption(rng, each.scene) + suffix for each in batch]
    pooled, sequence = text.encode(texts)
    mask = torch.zeros(1, 1, 1, TEXT_LENGTH + height * width)
    mask[..., TEXT_LENGTH - 1] = math.log(rng.choice(PADDED_LENGTHS) - TEXT_LENGTH + 1)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    positions = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).float()
    t = when[:, None, None]
    guided = transformer.config.guidance_embeds
    with torch.autocast("cpu", torch.bfloat16):
        velocity = transformer(
            hidden_states=(1 - t) * picture + t * noise,
            encoder_hidden_states=sequence,
            pooled_projections=pooled,
            timestep=when,
            img_ids=positions,
            txt_ids=torch.zeros(TEXT_LENGTH, 3),
            guidance=torch.tensor([each.guidance for each in batch]) if guided else None,
            joint_attention_kwargs={"attention_mask": mask},
            return_dict=False,
        )[0]
    error = (velocity.float() - (noise - picture)).square().mean(-1)
    if not rims:
        return error.mean()
    weights = torch.stack([1 + rims * near_outlines(each.scene, width, height) for each in batch])
    return (weights * error).mean() / weights.mean()


def near_outlines(scene: Scene, width: int, height: int) -> Tensor:
    """How much of each token, (width x height), lies about an outline: 0..1 for a medium object.

    Objects count alike: what lies about one of half that radius weighs four times as much.
    """
    found = np.zeros((height, width), np.float32)
    for thing in scene.objects:
        fine = surroundings(thing, TOKEN * width, TOKEN * height)
        about = fine.reshape(height, TOKEN, width, TOKEN).mean((1, 3))
        found += about * (SIZES["medium"] / thing.radius) ** 2
    return torch.from_numpy(found).flatten()
