"""Images to latents and back, through the VAE."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from diffusers import FluxPipeline
from PIL import Image

TILE = 64  # latents along a side of a tile; 512 pixels with FLUX.1's VAE


def memory_format(device: torch.device) -> torch.memory_format:
    """The layout of the VAE's weights that suits a device.

    On a CPU, channels_last decodes in two thirds of the time. With CUDA, torch's group norm knows
    the contiguous layout alone: it converts its input to that, and gives its output in it
    (pytorch/pytorch, aten/src/ATen/native/group_norm.cpp, `native_group_norm`). With channels_last
    weights, every convolution after it would convert it back.
    """
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format


class Autoencoder:
    """The VAE of a pipeline, with the pipeline's scaling and packing of latents."""

    def __init__(self, pipeline: FluxPipeline) -> None:
        self._pipeline = pipeline
        self._vae = pipeline.vae
        self.vae_scale_factor: int = pipeline.vae_scale_factor
        """Pixels along the side of a latent."""

    @property
    def token_size(self) -> int:
        """Pixels along the side of a token: the transformer sees 2 x 2 latents as one."""
        return 2 * self.vae_scale_factor

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        device: torch.device = self._vae.device
        return device

    def encode(self, image: Image.Image) -> torch.Tensor:
        """An RGB image's latents, [1, channels, height / f, width / f]; f is the scale factor."""
        pixels = self._pipeline.image_processor.preprocess(image)
        mean: torch.Tensor = self._vae.encode(
            pixels.to(self._vae.device, self._vae.dtype)
        ).latent_dist.mode()
        return mean.sub(self._vae.config.shift_factor).mul(self._vae.config.scaling_factor)

    def decode(
        self, latents: torch.Tensor, width: int, height: int, *, tiled: bool = False
    ) -> Image.Image:
        """The RGB image of packed latents, [1, tokens, 4 * channels].

        Args:
            latents: as a transformer generates them.
            width, height: of the image, in pixels.
            tiled: decode overlapping tiles and blend them: less memory, and slightly another
                image, as a tile does not see the others.
        """
        config = self._vae.config
        latents = self._pipeline._unpack_latents(latents, height, width, self.vae_scale_factor)
        latents = latents / config.scaling_factor + config.shift_factor
        with self._tiling() if tiled else nullcontext():
            pixels = self._vae.decode(latents, return_dict=False)[0]
        processor = self._pipeline.image_processor
        image: Image.Image = processor.postprocess(pixels, output_type="pil")[0]
        return image

    @contextmanager
    def _tiling(self) -> Iterator[None]:
        """diffusers' tiling; its own size of a tile is 1024 pixels, which saves nothing here."""
        self._vae.tile_latent_min_size = TILE
        self._vae.tile_sample_min_size = TILE * self.vae_scale_factor
        self._vae.enable_tiling()
        try:
            yield
        finally:
            self._vae.disable_tiling()
