"""Pictures in and out: whatever Pillow reads, as RGB or as a mask; webp, jpg and png files."""

import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

PIXELS_PER_MEGAPIXEL = 1024 * 1024
FORMATS = {"webp": "WEBP", "jpg": "JPEG", "png": "PNG"}
_SIXTEEN_BIT = 65535


class PictureError(ValueError):
    """An input picture that cannot be used; the message says why."""


def read_picture(source: os.PathLike[str] | str, max_pixels: int) -> Image.Image:
    """Read an input picture as RGB: upright by its EXIF orientation, over white, first frame.

    Args:
        source: the file that the server delivered.
        max_pixels: larger pictures are refused before they are decoded.

    Raises:
        PictureError: for what is not a delivered file, not a picture, broken, or too large.
    """
    return _flatten(_read("image", source, max_pixels), background="white").convert("RGB")


def read_mask(source: os.PathLike[str] | str, max_pixels: int) -> Image.Image:
    """Read a mask as 8-bit grey, over black; otherwise as `read_picture`."""
    return _flatten(_read("mask", source, max_pixels), background="black").convert("L")


def save(image: Image.Image, path: Path, output_format: str, quality: int) -> None:
    """Write an RGB image; quality 0 to 100 counts for webp and jpg, and not for png."""
    options = {} if output_format == "png" else {"quality": quality}
    image.save(path, format=FORMATS[output_format], **options)


def _read(name: str, source: os.PathLike[str] | str, max_pixels: int) -> Image.Image:
    if isinstance(source, str):  # the server delivers files as paths; a plain str is the caller's
        raise PictureError(f"{name}: {source[:100]!r} is neither an http(s) URL nor a data URI")
    try:
        with warnings.catch_warnings(), Image.open(source) as picture:
            warnings.simplefilter("ignore")  # remarks on broken metadata, and the size check below
            if picture.width * picture.height > max_pixels:
                raise Image.DecompressionBombError
            picture.load()
            return ImageOps.exif_transpose(picture)
    except Image.DecompressionBombError as error:  # Pillow's own limit, or ours
        raise PictureError(
            f"{name}: has more pixels than this server's limit of "
            f"{max_pixels / PIXELS_PER_MEGAPIXEL:g} megapixels; send a smaller picture"
        ) from error
    except Exception as error:  # Pillow's plugins raise almost anything on hostile files
        raise PictureError(
            f"{name}: cannot be read as a picture ({type(error).__name__}: {error}); "
            "send a complete JPEG, PNG, WebP or other file that Pillow reads"
        ) from error


def _flatten(picture: Image.Image, background: str) -> Image.Image:
    """Bring high-depth modes to 8 bits, and transparency over a plain background."""
    if picture.mode.startswith("I") or picture.mode == "F":
        return _to_8_bits(picture)
    if not picture.has_transparency_data:
        return picture
    layer = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, background), layer)


def _to_8_bits(picture: Image.Image) -> Image.Image:
    """Scale 16-bit grey (modes I;16 and I) and float grey (0 to 1, or 0 to 255) to mode L."""
    values = np.nan_to_num(np.asarray(picture, dtype=np.float64))
    top = _SIXTEEN_BIT
    if picture.mode == "F":
        top = 1 if values.max() <= 1 else 255
    return Image.fromarray(np.rint(values.clip(0, top) * (255 / top)).astype(np.uint8))
