"""Weights that let a VAE carry pictures before it is trained, among random ones."""

import torch
from diffusers import AutoencoderKL
from torch import nn

ANCHOR = 8.0  # constant channels of the VAE: large beside RGB in -1..1, they fix the norms' scale
STRUCTURED = 8  # channels with a given meaning: R, G, B, -R, -G, -B, ANCHOR, -ANCHOR
RESIDUAL_GAIN = 0.05  # of the VAE's random residual branches beside the structured path
LOG_VARIANCE = -6.0


@torch.no_grad()
def let_pictures_through(vae: AutoencoderKL) -> AutoencoderKL:
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
    _write_out(vae.encoder.conv_out, signs / vae.config.scaling_factor)
    vae.encoder.conv_out.bias[latents:] = LOG_VARIANCE
    _read(vae.decoder.conv_in, signed_rgb @ signs.T * vae.config.scaling_factor / latents)
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
