"""FLUX.1 itself at its real width and depth, without memory: every parameter on the meta device."""

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from transformers import CLIPTextModel, T5EncoderModel

from flux.variants import VARIANTS
from miniature import checkpoint
from miniature.checkpoint import FLUX1
from miniature.vocabulary import clip_tokenizer, t5_tokenizer

VAE_FACTOR = 8  # pixels along the side of a latent
PATCH = 2  # latents along the side of a token


def transformer(variant: str) -> FluxTransformer2DModel:
    """The transformer of dev or schnell in bf16."""
    with torch.device("meta"):
        return checkpoint.transformer(FLUX1, guidance=VARIANTS[variant].guidance).bfloat16()


def t5() -> T5EncoderModel:
    """The encoder of T5 v1.1 XXL in bf16."""
    with torch.device("meta"):
        return checkpoint.t5(FLUX1, t5_tokenizer()).bfloat16()


def clip() -> CLIPTextModel:
    """The text encoder of CLIP ViT-L/14 in bf16."""
    with torch.device("meta"):
        return checkpoint.clip(FLUX1, clip_tokenizer()).bfloat16()


def vae() -> AutoencoderKL:
    """The autoencoder in bf16."""
    with torch.device("meta"):
        return checkpoint.vae(FLUX1).bfloat16()


def image_tokens(side: int) -> int:
    """Tokens of a square picture whose side has that many pixels."""
    return (side // (VAE_FACTOR * PATCH)) ** 2
