"""A miniature FLUX.1 checkpoint with random weights: what is trained, and what tests generate with.

The classes, file layout and configurations are those of the official checkpoints; only the
dimensions are small. `dev` is a complete pipeline. `schnell` holds what differs, the transformer
and the scheduler; load it with dev's other components:

    dev = FluxPipeline.from_pretrained(directory / "dev", dtype=torch.float32)
    shared = {name: dev.components[name] for name in SHARED}
    FluxPipeline.from_pretrained(directory / "schnell", dtype=torch.float32, **shared)

The weights are drawn here and not by the libraries' own initialisation, so the bytes do not change
with a library's version; and uniformly, because a uniform draw and a product round alike on every
CPU, while a normal draw goes through its logarithm and cosine.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from miniature.pass_through import STRUCTURED, let_pictures_through
from miniature.vocabulary import CLIP_LENGTH, clip_tokenizer, t5_tokenizer

logger = logging.getLogger(__name__)
M = TypeVar("M", bound=nn.Module)

SHARED = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
SCALING_FACTOR, SHIFT_FACTOR = 0.3611, 0.1159


@dataclass(frozen=True)
class Dimensions:
    """Widths and depths of the four models; the VAE's scale is 2 ** (len(vae_channels) - 1)."""

    double_blocks: int = 2
    single_blocks: int = 3
    heads: int = 4
    rope_axes: tuple[int, int, int] = (8, 16, 16)  # frame, row, column: their sum is a head's width
    t5_layers: int = 3
    t5_width: int = 96
    t5_heads: int = 4
    t5_head_width: int = 24
    t5_feed_forward: int = 192
    clip_layers: int = 3
    clip_width: int = 96
    clip_heads: int = 4
    clip_feed_forward: int = 192
    vae_channels: tuple[int, ...] = (16, 16, 32, 64, 64)
    vae_layers: int = 1
    vae_groups: int = 1  # of its norms; several would each strip the flat colour of a flat picture
    latent_channels: int = 16
    t5_vocabulary: int | None = None  # None: the tokenizer's
    clip_vocabulary: int | None = None

    def __post_init__(self) -> None:
        if min(self.vae_channels) < STRUCTURED or self.latent_channels % 8:
            raise ValueError(
                f"vae_channels {self.vae_channels} must be {STRUCTURED} or more each, and "
                f"latent_channels {self.latent_channels} a multiple of 8"
            )


FLUX1 = Dimensions(  # of the official repositories' config.json files
    double_blocks=19,
    single_blocks=38,
    heads=24,
    rope_axes=(16, 56, 56),
    t5_layers=24,
    t5_width=4096,
    t5_heads=64,
    t5_head_width=64,
    t5_feed_forward=10240,
    clip_layers=12,
    clip_width=768,
    clip_heads=12,
    clip_feed_forward=3072,
    vae_channels=(128, 256, 512, 512),
    vae_layers=2,
    vae_groups=32,
    t5_vocabulary=32128,
    clip_vocabulary=49408,
)


@dataclass(frozen=True)
class Models:
    """All that dev and schnell are made of, in bf16."""

    vae: AutoencoderKL
    clip: CLIPTextModel
    clip_tokenizer: CLIPTokenizer
    t5: T5EncoderModel
    t5_tokenizer: T5Tokenizer
    dev: FluxTransformer2DModel
    schnell: FluxTransformer2DModel

    def modules(self) -> tuple[nn.Module, ...]:
        """What has weights."""
        return self.vae, self.clip, self.t5, self.dev, self.schnell


def build(directory: Path, dimensions: Dimensions = Dimensions(), seed: int = 0) -> None:
    """Write `directory/dev` and `directory/schnell`, bf16 safetensors; same seed, same bytes."""
    save(models(dimensions, seed), directory)


def models(dimensions: Dimensions, seed: int) -> Models:
    """Build all models with random weights; the same seed gives the same."""
    with torch.random.fork_rng(devices=[]):  # constructing a module draws from the global RNG
        generator = torch.Generator().manual_seed(seed)
        tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
        return Models(
            vae=let_pictures_through(randomise(vae(dimensions), generator)).bfloat16(),
            clip=randomise(clip(dimensions, tokenizer), generator).bfloat16(),
            clip_tokenizer=tokenizer,
            t5=randomise(t5(dimensions, tokenizer_2), generator).bfloat16(),
            t5_tokenizer=tokenizer_2,
            dev=randomise(transformer(dimensions, guidance=True), generator).bfloat16(),
            schnell=randomise(transformer(dimensions, guidance=False), generator).bfloat16(),
        )


def save(models: Models, directory: Path) -> None:
    """Write `directory/dev` and `directory/schnell`, bf16 safetensors."""
    shared = {
        "vae": models.vae,
        "text_encoder": models.clip,
        "text_encoder_2": models.t5,
        "tokenizer": models.clip_tokenizer,
        "tokenizer_2": models.t5_tokenizer,
    }
    for module in models.modules():
        module.bfloat16()
    pipeline = FluxPipeline(transformer=models.dev, scheduler=dev_sigmas(), **shared)
    pipeline.save_pretrained(directory / "dev")
    schnell = directory / "schnell"
    pipeline = FluxPipeline(transformer=models.schnell, scheduler=schnell_sigmas(), **shared)
    pipeline.save_config(schnell)  # the index, which names the shared parts as well
    models.schnell.save_pretrained(schnell / "transformer")
    pipeline.scheduler.save_pretrained(schnell / "scheduler")
    logger.info("wrote %s", directory)


def dev_sigmas() -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of dev."""
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def schnell_sigmas() -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of schnell."""
    return FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False)


def transformer(dimensions: Dimensions, *, guidance: bool) -> FluxTransformer2DModel:
    """A transformer of these dimensions, of dev if it takes the guidance as an input."""
    return FluxTransformer2DModel(
        in_channels=4 * dimensions.latent_channels,
        num_layers=dimensions.double_blocks,
        num_single_layers=dimensions.single_blocks,
        attention_head_dim=sum(dimensions.rope_axes),
        num_attention_heads=dimensions.heads,
        joint_attention_dim=dimensions.t5_width,
        pooled_projection_dim=dimensions.clip_width,
        guidance_embeds=guidance,
        axes_dims_rope=dimensions.rope_axes,
    )


def clip(dimensions: Dimensions, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """CLIP's text encoder, for this tokenizer."""
    config = CLIPTextConfig(
        vocab_size=dimensions.clip_vocabulary or len(tokenizer),
        hidden_size=dimensions.clip_width,
        projection_dim=dimensions.clip_width,
        intermediate_size=dimensions.clip_feed_forward,
        num_hidden_layers=dimensions.clip_layers,
        num_attention_heads=dimensions.clip_heads,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,  # the pooled output is taken at this token
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def t5(dimensions: Dimensions, tokenizer: T5Tokenizer) -> T5EncoderModel:
    """T5's encoder, for this tokenizer."""
    config = T5Config(
        vocab_size=dimensions.t5_vocabulary or len(tokenizer),
        d_model=dimensions.t5_width,
        d_kv=dimensions.t5_head_width,
        d_ff=dimensions.t5_feed_forward,
        num_layers=dimensions.t5_layers,
        num_heads=dimensions.t5_heads,
        feed_forward_proj="gated-gelu",
        relative_attention_max_distance=32,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5EncoderModel(config)


def vae(dimensions: Dimensions) -> AutoencoderKL:
    """The autoencoder, without the quantizing convolutions that FLUX.1's does not have."""
    blocks = len(dimensions.vae_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=dimensions.vae_channels,
        layers_per_block=dimensions.vae_layers,
        latent_channels=dimensions.latent_channels,
        norm_num_groups=dimensions.vae_groups,
        scaling_factor=SCALING_FACTOR,
        shift_factor=SHIFT_FACTOR,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


@torch.no_grad()
def randomise(module: M, generator: torch.Generator) -> M:
    """Draw all parameters: variance 1 / fan-in, embeddings 1, norms the identity, biases zero.

    The generator is one of the module's device.
    """
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in sorted(module.named_parameters()):
        if parameter.ndim > 1:
            fan_in = 1 if id(parameter) in embeddings else parameter[0].numel()
            bound = (3 / fan_in) ** 0.5
            values = torch.rand(parameter.shape, generator=generator, device=parameter.device)
            parameter.copy_(values.mul_(2).sub_(1)).mul_(bound)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return module.eval()
