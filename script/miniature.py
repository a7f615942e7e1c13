"""A miniature FLUX.1 checkpoint with random weights: what is trained, and what tests draw with.

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
from vocabulary import CLIP_LENGTH, clip_tokenizer, t5_tokenizer

logger = logging.getLogger(__name__)
M = TypeVar("M", bound=nn.Module)

SHARED = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
SCALING_FACTOR, SHIFT_FACTOR = 0.3611, 0.1159
ANCHOR = 8.0  # constant channels of the VAE: large beside RGB in -1..1, they fix the norms' scale
STRUCTURED = 8  # channels with a given meaning: R, G, B, -R, -G, -B, ANCHOR, -ANCHOR
RESIDUAL_GAIN = 0.05  # of the VAE's random residual branches beside the structured path
LOG_VARIANCE = -6.0


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
    latent_channels: int = 16

    def __post_init__(self) -> None:
        if min(self.vae_channels) < STRUCTURED or self.latent_channels % 8:
            raise ValueError(
                f"vae_channels {self.vae_channels} must be {STRUCTURED} or more each, and "
                f"latent_channels {self.latent_channels} a multiple of 8"
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
            vae=_vae(dimensions, generator),
            clip=_clip(dimensions, tokenizer, generator),
            clip_tokenizer=tokenizer,
            t5=_t5(dimensions, tokenizer_2, generator),
            t5_tokenizer=tokenizer_2,
            dev=_transformer(dimensions, guidance=True, generator=generator),
            schnell=_transformer(dimensions, guidance=False, generator=generator),
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
    pipeline = FluxPipeline(transformer=models.dev, scheduler=_dev_sigmas(), **shared)
    pipeline.save_pretrained(directory / "dev")
    schnell = directory / "schnell"
    pipeline = FluxPipeline(transformer=models.schnell, scheduler=_schnell_sigmas(), **shared)
    pipeline.save_config(schnell)  # the index, which names the shared parts as well
    models.schnell.save_pretrained(schnell / "transformer")
    pipeline.scheduler.save_pretrained(schnell / "scheduler")
    logger.info("wrote %s", directory)


def _dev_sigmas() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def _schnell_sigmas() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False)


def _transformer(
    dimensions: Dimensions, *, guidance: bool, generator: torch.Generator
) -> FluxTransformer2DModel:
    transformer = FluxTransformer2DModel(
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
    return _randomise(transformer, generator).bfloat16()


def _clip(
    dimensions: Dimensions, tokenizer: CLIPTokenizer, generator: torch.Generator
) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
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
    return _randomise(CLIPTextModel(config), generator).bfloat16()


def _t5(
    dimensions: Dimensions, tokenizer: T5Tokenizer, generator: torch.Generator
) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
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
    return _randomise(T5EncoderModel(config), generator).bfloat16()


def _vae(dimensions: Dimensions, generator: torch.Generator) -> AutoencoderKL:
    blocks = len(dimensions.vae_channels)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=dimensions.vae_channels,
        layers_per_block=dimensions.vae_layers,
        latent_channels=dimensions.latent_channels,
        norm_num_groups=1,  # several groups would each strip the flat colour of a flat picture
        scaling_factor=SCALING_FACTOR,
        shift_factor=SHIFT_FACTOR,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return _structure(_randomise(vae, generator)).bfloat16()


@torch.no_grad()
def _randomise(module: M, generator: torch.Generator) -> M:
    """Draw all parameters: variance 1 / fan-in, embeddings 1, norms the identity, biases zero."""
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in sorted(module.named_parameters()):
        if parameter.ndim > 1:
            fan_in = 1 if id(parameter) in embeddings else parameter[0].numel()
            bound = (3 / fan_in) ** 0.5
            parameter.copy_(torch.rand(parameter.shape, generator=generator) * 2 - 1).mul_(bound)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return module.eval()


@torch.no_grad()
def _structure(vae: AutoencoderKL) -> AutoencoderKL:
    """Let a blurred picture through: an average in the encoder, a tent filter in the decoder.

    Channels 0..5 carry R, G, B and their negatives, so SiLU(x) - SiLU(-x) = x undoes the last
    activation; channels 6 and 7 hold constants, so the last norm divides by about a constant.
    Latent channel j is (±R ±G ±B) / scaling_factor with the signs of j's bits: orthogonal columns,
    and about unit variance once scaled.
    """
    average = torch.zeros(3, 3)
    average[:2, :2] = 0.25
    tent = torch.outer(*[torch.tensor([0.25, 0.5, 0.25])] * 2)
    for name, module in vae.named_modules():
        if name.endswith((".conv2", "to_out.0")):
            module.weight.mul_(RESIDUAL_GAIN)
        elif name.endswith("conv_shortcut"):
            _pass_through(module, torch.ones(1, 1))
        elif name.endswith("downsamplers.0.conv"):
            _pass_through(module, average)
        elif name.endswith("upsamplers.0.conv"):
            _pass_through(module, tent)
    latents = vae.config.latent_channels
    bits = torch.arange(latents)[:, None] >> torch.arange(3) & 1
    signs = 1.0 - 2.0 * bits.float()  # (latents, RGB)
    signed_rgb = torch.cat([torch.eye(3), -torch.eye(3)])  # (±RGB, RGB)
    _read(vae.encoder.conv_in, signed_rgb)
    _write_out(vae.encoder.conv_out, signs / SCALING_FACTOR)
    vae.encoder.conv_out.bias[latents:] = LOG_VARIANCE
    _read(vae.decoder.conv_in, signed_rgb @ signs.T * SCALING_FACTOR / latents)
    _write_out(vae.decoder.conv_out, torch.eye(3))
    return vae


def _pass_through(conv: nn.Conv2d, kernel: torch.Tensor) -> None:
    """Filter each structured channel by the kernel (height, width) into itself; drop the others."""
    conv.weight.zero_()
    for channel in range(STRUCTURED):
        conv.weight[channel, channel] = kernel


def _read(conv: nn.Conv2d, matrix: torch.Tensor) -> None:
    """Set the structured channels: the matrix (±RGB, inputs) at the centre, and the anchors."""
    assert conv.bias is not None
    conv.weight[:STRUCTURED] = 0.0
    conv.weight[:6, :, 1, 1] = matrix
    conv.bias[6:STRUCTURED] = torch.tensor([ANCHOR, -ANCHOR])


def _write_out(conv: nn.Conv2d, matrix: torch.Tensor) -> None:
    """Undo norm and SiLU of the structured channels, then apply the matrix (outputs, RGB)."""
    deviation = ANCHOR * (2 / conv.in_channels) ** 0.5
    conv.weight.zero_()
    conv.weight[: len(matrix), :6, 1, 1] = deviation * torch.cat([matrix, -matrix], dim=1)
