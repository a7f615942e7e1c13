"""FLUX.1 itself at its real width and depth, without memory: every parameter on the meta device.

The dimensions are those of the official repositories' config.json files. diffusers' defaults are
FLUX.1's transformer: 19 double and 38 single blocks, 24 heads of 128, T5 embeddings of 4096, pooled
ones of 768.
"""

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from flux.variants import VARIANTS

VAE_FACTOR = 8  # pixels along the side of a latent
PATCH = 2  # latents along the side of a token


def transformer(variant: str) -> FluxTransformer2DModel:
    """The transformer of dev or schnell in bf16."""
    with torch.device("meta"):
        found = FluxTransformer2DModel(guidance_embeds=VARIANTS[variant].guidance)
    return found.to(torch.bfloat16)


def t5() -> T5EncoderModel:
    """The encoder of T5 v1.1 XXL in bf16."""
    config = T5Config(
        vocab_size=32128,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    )
    with torch.device("meta"):
        return T5EncoderModel(config).to(torch.bfloat16)


def clip() -> CLIPTextModel:
    """The text encoder of CLIP ViT-L/14 in bf16."""
    config = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    with torch.device("meta"):
        return CLIPTextModel(config).to(torch.bfloat16)


def vae() -> AutoencoderKL:
    """The autoencoder in bf16."""
    widths = (128, 256, 512, 512)
    with torch.device("meta"):
        found = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            block_out_channels=widths,
            layers_per_block=2,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    return found.to(torch.bfloat16)


def image_tokens(side: int) -> int:
    """Tokens of a square picture whose side has that many pixels."""
    return (side // (VAE_FACTOR * PATCH)) ** 2
