"""What the pipelines are told of a request's size and input image."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from flux.autoencoder import Autoencoder
from flux.inpaint import repainted_cells
from flux.request import Request


@dataclass(frozen=True)
class Canvas:
    """The size that is generated, and the pipeline's arguments for the input image.

    Attributes:
        width, height: in pixels; the request's size, extended to whole tokens of this VAE.
        image_seq_len: tokens of the transformer.
        arguments: of the pipeline's call: the input image's latents, and the mask.
    """

    width: int
    height: int
    image_seq_len: int
    arguments: dict[str, Any]


def prepare(request: Request, autoencoder: Autoencoder) -> Canvas:
    """Encode the input image of a request, if it has one."""
    side = autoencoder.token_size
    columns, rows = math.ceil(request.width / side), math.ceil(request.height / side)
    width, height = columns * side, rows * side
    arguments: dict[str, Any] = {}
    if request.image:
        latents = autoencoder.encode(_extend(request.image, width, height))
        arguments |= {"image": latents, "strength": 1.0}  # the sigmas hold the strength
    if request.mask:
        mask = torch.from_numpy(np.array(_extend(request.mask, width, height)))
        cells = repainted_cells(mask[None, None] / 255, autoencoder.vae_scale_factor)
        arguments |= {"mask_image": cells, "masked_image_latents": latents}
    return Canvas(width, height, columns * rows, arguments)


def _extend(image: Image.Image, width: int, height: int) -> Image.Image:
    """Extend an image to the right and below by repeating its edge."""
    pixels = np.asarray(image)
    missing = [(0, height - image.height), (0, width - image.width)]
    missing += [(0, 0)] * (pixels.ndim - 2)
    return Image.fromarray(np.pad(pixels, missing, mode="edge"))
