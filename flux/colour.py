"""Colour profiles of input images: their colours converted to sRGB, which FLUX.1 was trained on.

Photographs from phones carry a profile of Display P3, those from cameras often Adobe RGB, and
images for print CMYK. Their numbers read as sRGB give faded or shifted colours. Pillow's ImageCms
(Little CMS) converts with the relative colorimetric intent and black point compensation: colours
that sRGB can show are kept, others become the nearest that it can show.
"""

import io
import logging

from PIL import Image, ImageCms

logger = logging.getLogger(__name__)

MAX_PROFILE_BYTES = 4 << 20  # CMYK profiles are the largest, at about 2 MB
MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # of the profile's colour space
FITTING = {("RGB", "RGB"), ("L", "L"), ("L", "RGB"), ("CMYK", "CMYK")}  # image's mode, profile's


def to_srgb(image: Image.Image) -> Image.Image:
    """Convert an image by its colour profile.

    Args:
        image: 8 bits a channel, of any mode.

    Returns:
        RGB, or RGBA for an image with transparency; the image itself if it has no profile, one of
        sRGB, or one that cannot be used, which the log says.
    """
    profile = image.info.get("icc_profile")
    if not profile:
        return image
    try:
        return _converted(image, profile)
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        logger.info("The image's colour profile is ignored: %s", error)
        return image


def _converted(image: Image.Image, profile: bytes) -> Image.Image:
    if len(profile) > MAX_PROFILE_BYTES:
        raise ValueError(f"it has {len(profile)} bytes, and at most {MAX_PROFILE_BYTES} are read")
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    description = ImageCms.getProfileDescription(source).strip()
    if "sRGB" in description and "linear" not in description.lower():  # GIMP has one of its own
        return image
    space = source.profile.xcolor_space.strip()
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    colours = _without_alpha(image)
    mode = MODES.get(space)
    if mode is None or (colours.mode, mode) not in FITTING:
        raise ValueError(f"it is for {space}, and the image is {image.mode}")
    result = ImageCms.profileToProfile(
        colours.convert(mode),
        source,
        ImageCms.createProfile("sRGB"),
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        outputMode="RGB",
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    assert result is not None
    if alpha:
        result.putalpha(alpha)
    logger.info("The image's colours are converted from %s to sRGB", description[:80] or space)
    return result


def _without_alpha(image: Image.Image) -> Image.Image:
    """Its colours alone, as RGB, L or CMYK."""
    if image.mode in ("1", "L", "LA", "La"):
        return image.convert("L")
    return image if image.mode in ("RGB", "CMYK") else image.convert("RGB")
