"""Input images: their colours, whatever profile they carry."""

import io
import logging
import struct
from pathlib import Path
from zlib import compress, crc32

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, ImageOps

from flux.images import ImageError, read_image, read_mask
from tests.support.pictures import colours

LIMIT = 1 << 20
GAMMA = 2.19921875  # Adobe RGB's, which an ICC curve holds exactly
# Primaries under D50, as the profiles hold them: columns of red, green and blue in XYZ.
P3 = np.array(
    [[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]]
)
ADOBE = np.array(
    [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]]
)
SRGB = np.array(
    [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]
)
WHITE = (0.9642, 1.0, 0.8249)  # D50
COLOURS = [(255, 0, 0), (0, 255, 0), (40, 60, 200), (128, 128, 128), (250, 200, 150), (0, 0, 0)]


def fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def profile(
    space: bytes, tags: dict[bytes, bytes], pcs: bytes = b"XYZ ", name: bytes = b"made for a test"
) -> bytes:
    """A version 2 ICC profile (ICC.1:2001-04): header, table of tags, and their data."""
    name += b"\0"
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", len(name)) + name + bytes(78),
        b"cprt": b"text" + bytes(4) + b"none\0",
        b"wtpt": b"XYZ " + bytes(4) + fixed(*WHITE),
        **tags,
    }
    table, data, start = b"", b"", 128 + 4 + 12 * len(tags)
    for signature, content in tags.items():
        table += signature + struct.pack(">II", start + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    header = struct.pack(">I4sI4s4s4s", start + len(data), b"test", 0x02400000, kind, space, pcs)
    header += bytes(12) + b"acsp" + bytes(28) + fixed(*WHITE) + bytes(48)
    return header + struct.pack(">I", len(tags)) + table + data


def curve(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)


def rgb_profile(
    primaries: np.ndarray, gamma: float = GAMMA, name: bytes = b"made for a test"
) -> bytes:
    tags = {}
    for channel, column in zip(b"rgb", primaries.T, strict=True):
        tags[bytes([channel]) + b"XYZ"] = b"XYZ " + bytes(4) + fixed(*column)
        tags[bytes([channel]) + b"TRC"] = curve(gamma)
    return profile(b"RGB ", tags, name=name)


def grey_profile() -> bytes:
    return profile(b"GRAY", {b"kTRC": curve(1.0)})


def cmyk_profile() -> bytes:
    """A lookup table in which black ink gives L* = 0 and all else is white."""
    identity = bytes(range(256))
    nodes = b"".join(bytes([0 if k else 255, 128, 128]) for _ in range(8) for k in (0, 1))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    return profile(b"CMYK", {b"A2B0": lut + identity * 4 + nodes + identity * 3}, b"Lab ")


def encoded(linear: np.ndarray) -> np.ndarray:
    """sRGB's curve (IEC 61966-2-1), to 0 to 255."""
    linear = linear.clip(0, 1)
    high = 1.055 * linear ** (1 / 2.4) - 0.055
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, high)


def expected(colours: np.ndarray, primaries: np.ndarray) -> np.ndarray:
    linear = (colours / 255) ** GAMMA
    return encoded(linear @ (np.linalg.inv(SRGB) @ primaries).T)


def picture(mode: str = "RGB") -> Image.Image:
    image = Image.new("RGB", (16 * len(COLOURS), 16))
    for place, colour in enumerate(COLOURS):
        image.paste(colour, (16 * place, 0, 16 * place + 16, 16))
    return image.convert(mode)


def written(path: Path, image: Image.Image, icc: bytes, kind: str = "PNG") -> Path:
    image.save(path, kind, icc_profile=icc)
    return path


def patches(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=float)[8, 8::16]


@pytest.mark.parametrize("primaries", [P3, ADOBE], ids=["Display P3", "Adobe RGB"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_colours_are_those_that_the_profile_means(tmp_path, caplog, primaries, kind) -> None:
    caplog.set_level(logging.INFO)
    image = picture()
    if kind == "WEBP":
        path = tmp_path / "x"
        image.save(path, kind, icc_profile=rgb_profile(primaries), lossless=True)
    else:
        path = written(tmp_path / "x", image, rgb_profile(primaries), kind)
    read = read_image(path, LIMIT)
    assert np.abs(patches(read) - expected(np.array(COLOURS), primaries)).max() < 2
    assert "converted from made for a test to sRGB" in caplog.text
    assert "icc_profile" not in read.info


def test_linear_srgb_is_not_taken_for_srgb(tmp_path) -> None:
    """By this name GIMP saves what it edits in linear light."""
    icc = rgb_profile(SRGB, gamma=1.0, name=b"GIMP built-in Linear sRGB")
    read = read_image(written(tmp_path / "x", picture(), icc), LIMIT)
    assert np.abs(patches(read) - encoded(np.array(COLOURS) / 255)).max() < 2


def test_transparency_is_kept_and_laid_over_white_after_the_conversion(tmp_path) -> None:
    image = picture("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    read = read_image(written(tmp_path / "x", image, rgb_profile(P3)), LIMIT)
    share = np.asarray(image.getchannel("A"), dtype=float)[8, 8::16, None] / 255
    over_white = share * expected(np.array(COLOURS), P3) + 255 * (1 - share)
    assert np.abs(patches(read) - over_white).max() < 2.5


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_profiles(tmp_path, mode) -> None:
    """Linear grey: 128 is half of the light, which sRGB writes as 188."""
    if mode == "I;16":
        image = Image.fromarray(np.full((16, 16), 128 * 257, dtype=np.uint16))
    else:
        image = Image.new("L", (16, 16), 128).convert(mode)
    read = read_image(written(tmp_path / "x", image, grey_profile()), LIMIT)
    assert np.abs(patches(read) - encoded(np.array(128 / 255))).max() < 2


def test_cmyk_by_its_own_profile(tmp_path) -> None:
    image = Image.new("CMYK", (32, 16), (200, 100, 50, 0))
    image.paste((0, 0, 0, 255), (16, 0, 32, 16))
    read = read_image(written(tmp_path / "x", image, cmyk_profile(), "TIFF"), LIMIT)
    assert np.abs(patches(read) - [[255, 255, 255], [0, 0, 0]]).max() < 3


def test_a_profile_of_srgb_changes_nothing(tmp_path) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    read = read_image(written(tmp_path / "x", picture(), srgb), LIMIT)
    assert (np.asarray(read) == np.asarray(picture())).all()


@pytest.mark.parametrize(
    ("icc", "reason"),
    [
        (b"not a profile", "cannot open profile"),
        (rgb_profile(P3)[:200], "cannot open profile"),
        (cmyk_profile(), "it is for CMYK, and the image is RGB"),
        (grey_profile(), "it is for GRAY, and the image is RGB"),
        (rgb_profile(P3) + bytes(5 << 20), "at most 4194304 are read"),
    ],
    ids=["damaged", "cut off", "CMYK", "grey", "large"],
)
def test_a_profile_that_cannot_be_used_is_ignored_with_a_log_line(
    tmp_path, caplog, icc, reason
) -> None:
    caplog.set_level(logging.INFO)
    read = read_image(written(tmp_path / "x", picture(), icc, "TIFF"), LIMIT)
    assert (np.asarray(read) == np.asarray(picture())).all()
    assert "The image's colour profile is ignored: " in caplog.text
    assert reason in caplog.text
    assert "icc_profile" not in read.info


def test_a_mask_is_not_colour(tmp_path) -> None:
    mask = Image.new("L", (16, 16), 128)
    read = read_mask(written(tmp_path / "x", mask, grey_profile()), LIMIT)
    assert np.asarray(read).tolist() == np.asarray(mask).tolist()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_data_say(tmp_path, orientation) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    colours(48, 32).save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as image:
        turned = ImageOps.exif_transpose(image).convert("RGB")
    assert np.array_equal(read_image(tmp_path / "x.png", LIMIT), turned)


def png(path: Path, pixels: np.ndarray, clear: tuple[int, ...]) -> Path:
    """Write 16 bits a channel, of grey or RGB, with a transparent colour; Pillow cannot."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc32(name + data))

    height, width, channels = pixels.shape
    kind = {1: 0, 3: 2}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
        + chunk(b"tRNS", struct.pack(f">{channels}H", *clear))
        + chunk(b"IDAT", compress(rows))
        + chunk(b"IEND", b"")
    )
    return path


@pytest.mark.parametrize(
    ("pixels", "clear", "image", "mask"),
    [
        ([[0x0100], [0x8000]], (0x8000,), [1, 255], [1, 0]),
        ([[0x0100], [0x8000]], (0x0080,), [1, 128], [1, 128]),
        ([[0x8000, 0, 0], [0, 0, 0x8000]], (0x8000, 0, 0), [255, 0], [0, 15]),
        ([[0x8000, 0, 0], [0, 0, 0x8000]], (0, 0, 0x80), [128, 0], [38, 15]),
    ],
)
def test_transparent_colours_of_16_bits(tmp_path, pixels, clear, image, mask) -> None:
    path = png(tmp_path / "x.png", np.array([pixels]), clear)
    assert np.asarray(read_image(path, LIMIT))[0, :, 0].tolist() == image
    assert np.asarray(read_mask(path, LIMIT))[0].tolist() == mask


def test_values_that_are_no_number_are_black(tmp_path) -> None:
    values = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    values[0, 1] = np.nan
    Image.fromarray(values).save(tmp_path / "x.tif")
    read = np.asarray(read_image(tmp_path / "x.tif", LIMIT))
    assert (read[0, 1, 0], read[-1, -1, 0]) == (0, 255)


@pytest.mark.parametrize("first", [b"heic", b"mif1"])
def test_heic_is_named_and_says_what_to_do(tmp_path, first) -> None:
    path = tmp_path / "IMG_0001.HEIC"
    head = struct.pack(">I", 24) + b"ftyp" + first + bytes(4)
    path.write_bytes(head + b"mif1heic" + bytes(400))
    with pytest.raises(ImageError, match=r"image: this is an HEIC image.* convert it to JPEG"):
        read_image(path, LIMIT)


def test_avif_is_read(tmp_path) -> None:
    buffer = io.BytesIO()
    picture().save(buffer, "AVIF", quality=90)
    path = tmp_path / "x.avif"
    path.write_bytes(buffer.getvalue())
    assert np.abs(patches(read_image(path, LIMIT)) - np.array(COLOURS)).max() < 12
