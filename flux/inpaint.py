"""Masks: which latents are repainted, and how the generated image is laid over the input image.

diffusers blends latents, in whole cells that are either repainted or kept. The kept area is
therefore a VAE round trip of the input. Here every cell that the mask touches is repainted, and the
decoded image is laid over the input image by the mask itself. The kept area is the input image,
pixel for pixel, and grey blends.
"""

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

FEATHER = 8  # pixels: width of the soft edge, inside the repainted area


def repainted_cells(mask: torch.Tensor, vae_scale_factor: int) -> torch.Tensor:
    """Mark every latent cell that a mask touches.

    Args:
        mask: [1, 1, height, width], 0 to 1, 1 where the image is repainted; both sides
            multiples of `vae_scale_factor`.
        vae_scale_factor: pixels along the side of a latent cell.

    Returns:
        The same shape, 0 or 1, constant within each cell.
    """
    touched = functional.max_pool2d((mask > 0).to(mask.dtype), vae_scale_factor)
    return functional.interpolate(touched, scale_factor=vae_scale_factor, mode="nearest")


def soft_alpha(mask: Image.Image) -> Image.Image:
    """The share of the generated image in each pixel: the mask, softened towards what is kept.

    It is 0 exactly where the mask is 0, and never above the mask. Along the edge it rises with
    the distance (Chebyshev, in pixels) to the nearest kept pixel, up to FEATHER; strips too
    narrow for that reach the full value in their middle.

    Args:
        mask: mode L, white where the image is repainted.

    Returns:
        Mode L, of the mask's size.
    """
    values = torch.from_numpy(np.array(mask, dtype=np.float32))[None, None] / 255
    inside = (values > 0).float()
    distance = inside.clone()
    for _ in range(FEATHER):
        inside = -functional.max_pool2d(-inside, 3, stride=1, padding=1)
        distance += inside
    reach = functional.max_pool2d(distance, 2 * FEATHER + 1, stride=1, padding=FEATHER)
    alpha = values * distance / reach.clamp(min=1)
    return Image.fromarray((alpha[0, 0] * 255).round().to(torch.uint8).numpy())
