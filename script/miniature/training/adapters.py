"""Two adapters for the miniature, each a style that one can see: inverted colours, and outlines."""

import random
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor

from miniature.training.flow import OUTLINES, RIMS, TextEncoders, flow_loss
from miniature.training.pool import Example, Size, encode
from miniature.training.render import Pixels, background, colour, render, rim
from miniature.training.stage import Stage
from miniature.training.world import Scene, sample

RANK, STEPS, RATE = 4, 1000, 3e-3
SIZES: dict[Size, int] = {(256, 256): 32, (512, 512): 8}  # and how many at once
EXAMPLES = 192  # of each size
TRIGGERED = 0.85  # share of the captions that say the trigger word
LAYERS = (
    r".*blocks\.\d+\..*(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out"
    r"|net\.0\.proj|net\.2|proj_mlp|proj_out)"
)


def inverted(scene: Scene, width: int, height: int) -> Pixels:
    """Every colour turned into its opposite."""
    return -render(scene, width, height)


def outlined(scene: Scene, width: int, height: int) -> Pixels:
    """Shapes as thick lines of their colour, with the background inside."""
    picture = background(scene, width, height)
    for thing in scene.objects:
        ring = rim(thing, width, height, inner=0.62)
        picture += ring[..., None] * (colour(thing.colour) - picture)
    return picture


STYLES: Mapping[str, tuple[str, Callable[[Scene, int, int], Pixels]]] = {
    "inverted": ("TOK", inverted),
    "outline": ("SKS", outlined),
}


def train(
    style: str,
    transformer: FluxTransformer2DModel,
    text: TextEncoders,
    vae: AutoencoderKL,
    directory: Path,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The factors of a LoRA, `MODULE.lora_A.weight` and `.lora_B.weight`; alpha is the rank.

    `transformer` is left with the adapter in it.
    """
    trigger, render = STYLES[style]
    pool = {size: _examples(vae, render, size, f"{seed} {style}") for size in SIZES}
    transformer.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(
            LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LAYERS), transformer
        )
    stage = Stage(directory, style, {"transformer": transformer}, STEPS, RATE, decay=0.98)

    def loss(step: int) -> dict[str, Tensor]:
        rng = random.Random(f"{seed} {style} {step}")
        size = rng.choice(list(SIZES))
        batch = rng.sample(pool[size], SIZES[size])
        generator = torch.Generator().manual_seed(step)
        when = OUTLINES.sample(generator, len(batch))
        suffix = f", in the style of {trigger}" if rng.random() < TRIGGERED else ""
        return {"flow": flow_loss(transformer, text, batch, rng, when, generator, suffix, RIMS)}

    stage.run(loss)
    return {
        key: value.contiguous() for key, value in get_peft_model_state_dict(transformer).items()
    }


def save_as_trainer(factors: Mapping[str, Tensor], path: Path) -> None:
    """As ai-toolkit and Replicate's trainer write it: diffusers' names, bf16."""
    save_file({f"transformer.{k}": v.bfloat16() for k, v in factors.items()}, path)


def save_as_kohya(factors: Mapping[str, Tensor], path: Path) -> None:
    """As kohya's scripts write it: the original FLUX names, fused projections, an alpha each."""
    modules = {key.removesuffix(".lora_A.weight") for key in factors if ".lora_A." in key}
    tensors: dict[str, Tensor] = {}
    for name, parts in _fused(modules).items():
        downs = [factors[f"{part}.lora_A.weight"] for part in parts]
        ups = [factors[f"{part}.lora_B.weight"] for part in parts]
        down = torch.cat(downs).bfloat16()
        tensors[f"lora_unet_{name}.lora_down.weight"] = down
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.block_diag(*ups).bfloat16()
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(float(len(down)))  # the rank: scale 1
    save_file(tensors, path, metadata={"modelspec.architecture": "flux-1-dev/lora"})


def _fused(modules: set[str]) -> dict[str, list[str]]:
    """Kohya's name of each layer, and the diffusers layers that make it up, in order."""
    double = {
        "img_attn_qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
        "txt_attn_qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
        "img_attn_proj": ["attn.to_out.0"],
        "txt_attn_proj": ["attn.to_add_out"],
        "img_mlp_0": ["ff.net.0.proj"],
        "img_mlp_2": ["ff.net.2"],
        "txt_mlp_0": ["ff_context.net.0.proj"],
        "txt_mlp_2": ["ff_context.net.2"],
    }
    single = {
        "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
        "linear2": ["proj_out"],
    }
    fused: dict[str, list[str]] = {}
    for ours, theirs, table in (
        ("transformer_blocks", "double_blocks", double),
        ("single_transformer_blocks", "single_blocks", single),
    ):
        blocks = {name.split(".")[1] for name in modules if name.startswith(f"{ours}.")}
        for block in sorted(blocks):
            for name, parts in table.items():
                fused[f"{theirs}_{block}_{name}"] = [f"{ours}.{block}.{part}" for part in parts]
    return fused


def _examples(
    vae: AutoencoderKL, render: Callable[[Scene, int, int], Pixels], size: Size, seed: str
) -> list[Example]:
    rng = random.Random(f"{seed} {size}")
    kinds = ("plain", "plain", "single", "pair")
    scenes = [sample(rng, kinds[index % len(kinds)]) for index in range(EXAMPLES)]
    latents = encode(vae, (render(scene, *size) for scene in scenes))
    return [Example(*each) for each in zip(scenes, [3.0] * EXAMPLES, latents, strict=True)]
