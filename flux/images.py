"""Read input images with Pillow, as RGB or as a mask."""

import os
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from flux.colour import to_srgb
from flux.sampling import MEGAPIXEL
from weights.serving.redact import without_secrets

REFUSED_FORMATS = {"EPS"}  # Pillow has Ghostscript run the program that such a file is
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")
MAX_SIDE = 65_535  # pixels


class ImageError(ValueError):
    """An input image that cannot be used; the message says why."""


def read_image(source: os.PathLike[str] | str, max_pixels: int) -> Image.Image:
    """Read an input image as RGB: upright by its EXIF orientation, over white, first frame.

    Args:
        source: the file that the server delivered.
        max_pixels: larger images are refused before they are decoded.

    Raises:
        ImageError: for what is not a delivered file, not an image, broken, or too large.
    """
    return _read("image", source, max_pixels, mode="RGB", background="white")


def read_mask(source: os.PathLike[str] | str, max_pixels: int) -> Image.Image:
    """Read a mask as 8-bit grey, over black; otherwise as `read_image`."""
    return _read("mask", source, max_pixels, mode="L", background="black")


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """Resize to exactly this size, in pixels; a mask without ringing, which would leak."""
    if image.size == (width, height):
        return image
    smooth = Image.Resampling.BILINEAR if image.mode == "L" else Image.Resampling.LANCZOS
    return image.resize((width, height), smooth)


def _read(
    name: str, source: os.PathLike[str] | str, max_pixels: int, *, mode: str, background: str
) -> Image.Image:
    if isinstance(source, str):  # the server delivers files as paths; a plain str is the caller's
        raise ImageError(
            f"{name}: {without_secrets(source)[:100]!r} is neither a URL (http://... or "
            "https://..., in lower case) nor a data URI"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on broken metadata, and the size check below
            with Image.open(source, formats=_formats()) as image:
                _check_size(name, image, max_pixels)
                has_16_bits = any("16" in str(tile.args) for tile in image.tile)
                image.load()
                _check_size(name, image, max_pixels)  # an icon's directory need not tell it
                with suppress(Exception):  # damaged EXIF must not refuse a picture
                    ImageOps.exif_transpose(image, in_place=True)
                read = _to_8_bits(image)
                if has_16_bits:
                    _scale_transparency(read)
                if mode == "RGB":  # a mask's values are numbers, not colours
                    read = to_srgb(read)
                read = _flatten(read, background).convert(mode)
                read.info.clear()  # comments and the like, which Pillow would write into an output
                return read
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(_too_large(name, max_pixels)) from error
    except UnidentifiedImageError as error:
        if _is_heic(source):
            raise ImageError(
                f"{name}: this is an HEIC image, as phones take them, and HEIC is not read; "
                "convert it to JPEG, or set the phone's camera to its most compatible format"
            ) from error
        raise ImageError(
            f"{name}: cannot be read as an image: it is in no known format; send a JPEG, PNG, "
            "WebP or another file that Pillow reads"
        ) from error
    except Exception as error:  # Pillow's plugins raise almost anything on hostile files
        raise ImageError(
            f"{name}: cannot be read as an image: the file is broken or incomplete "
            f"({type(error).__name__}); send it again, or as JPEG, PNG or WebP"
        ) from error


def _is_heic(path: os.PathLike[str]) -> bool:
    """Whether a file's type box names HEIC (ISO/IEC 23008-12, annex B); AVIF is another brand."""
    with Path(path).open("rb") as file:
        head = file.read(64)
    return head[4:8] == b"ftyp" and any(brand in head[8:] for brand in HEIC_BRANDS)


def _formats() -> list[str]:
    Image.init()
    return [name for name in Image.OPEN if name not in REFUSED_FORMATS]


def _check_size(name: str, image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise ImageError(_too_large(name, max_pixels))
    if max(image.size) > MAX_SIDE:
        raise ImageError(
            f"{name}: {image.width} x {image.height} pixels; at most {MAX_SIDE} a side are read"
        )


def _too_large(name: str, max_pixels: int) -> str:
    return (
        f"{name}: has more pixels than this server's limit of {max_pixels / MEGAPIXEL:g} "
        "megapixels; send a smaller image"
    )


def _flatten(image: Image.Image, background: str) -> Image.Image:
    """Put transparency over a plain background."""
    if not image.has_transparency_data:
        return image
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, background), layer)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits as mode L, or LA where a value is transparent; others as they are.

    I;16 files use the whole range. Those of mode I (32 bits) and F (float) do not say which
    they use: the smallest of 0 to 1 (float only), 0 to 255 and 0 to 65535 that holds them all.
    """
    if not (image.mode.startswith("I") or image.mode == "F"):
        return image
    values = np.nan_to_num(np.asarray(image, dtype=np.float32))
    ranges = {"I": (255, 65535), "F": (1, 255, 65535)}.get(image.mode, (65535,))
    top = next((top for top in ranges if values.max() <= top), ranges[-1])
    grey = Image.fromarray(np.rint(values.clip(0, top) * (255 / top)).astype(np.uint8))
    grey.info = dict(image.info)
    clear = grey.info.pop("transparency", None)
    if image.mode.startswith("I;16") and isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def _scale_transparency(image: Image.Image) -> None:
    """Bring the colour that is transparent to 8 bits, as Pillow did with the pixels of a PNG."""
    clear = image.info.get("transparency")
    if isinstance(clear, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in clear)
