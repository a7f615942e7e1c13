"""Input images over HTTP: whatever the file, and what the strength makes of it."""

import os
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from serving.server import processes, resident
from tests.support.hub import Hub
from tests.support.inputs import SMALL, UNCHECKED
from tests.support.pictures import colours, data_uri, difference, encode, same

SCHNELL = {"model": "schnell", "num_inference_steps": 1}
RAW = {"output_format": "png", **SMALL, **UNCHECKED}


def round_trip(server, content: bytes | Image.Image, **inputs) -> Image.Image:
    """An input picture as it comes back at prompt_strength 0."""
    return server.generate(image=data_uri(content), prompt_strength=0, **RAW, **inputs).image


def test_an_image_sets_the_size_and_nothing_else_does(server, photograph) -> None:
    image = data_uri(encode(photograph, "JPEG"))
    answer = server.generate(
        image=image, aspect_ratio="custom", width=256, megapixels=None, **SCHNELL
    )
    assert answer.image.size == (512, 608)  # of 512 x 600; nearest multiples of 16
    assert "the image sets the size" in answer.logs
    assert server.generate(image=image, **SCHNELL).image.size == (480, 560)  # a quarter megapixel
    wide = data_uri(colours(2000, 100))
    assert server.generate(image=wide, megapixels=None, **SCHNELL).image.size == (1440, 80)


def test_strength_zero_gives_the_picture_back(server, photograph) -> None:
    small = photograph.resize((256, 304))
    assert same(round_trip(server, small), small)
    assert same(round_trip(server, small, model="schnell"), small)
    mask = data_uri(Image.new("L", small.size, "white"))
    assert same(round_trip(server, small, mask=mask), small)


def test_what_a_failed_download_has_left_goes_with_the_next_request(server) -> None:
    whole = encode(colours(64, 32))
    with Hub() as hub:
        cut, mask = (hub.add_file(f"/{name}.png", whole) for name in ("cut", "mask"))
        hub.cut("/cut", after=len(whole) // 2)
        assert server.predict(image=cut, **RAW).status == "failed"
        assert server.predict(image=data_uri(whole), mask=f"{mask}.gone", **RAW).status == "failed"
    assert list(server.temporary.rglob("*cut.png"))
    server.generate(image=data_uri(whole), prompt_strength=0, **RAW)
    assert [path.name for path in server.temporary.rglob("*.png")] == []


def test_a_directory_of_inputs_that_vanishes_is_made_anew(server) -> None:
    for directory in server.temporary.glob("flux-files-*"):
        shutil.rmtree(directory)
    server.server.request("GET", "/health-check")
    assert round_trip(server, colours(64, 32)).size == (64, 32)


def test_exif_orientation_is_applied(server) -> None:
    picture = colours(64, 32)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter, clockwise
    upright = round_trip(server, encode(picture, exif=exif))
    assert same(upright, picture.transpose(Image.Transpose.ROTATE_270))


def test_damaged_exif_does_no_harm(server) -> None:
    picture = colours(64, 32)
    orientation = struct.pack("<HHII", 0x0112, 3, 1, 6)
    resolution = struct.pack("<HHI4s", 0x011A, 2, 4, b"72!")  # text, where a number belongs
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + orientation + resolution + b"\0\0\0\0"
    upright = picture.transpose(Image.Transpose.ROTATE_270)
    assert same(round_trip(server, encode(picture, exif=exif)), upright)
    garbage = encode(picture, "JPEG", quality=95, exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert round_trip(server, garbage).size == (64, 32)


def with_text(text: str) -> PngInfo:
    info = PngInfo()
    info.add_text("comment", text)
    return info


@pytest.mark.parametrize(
    "content",
    [
        encode(colours(256, 256), "JPEG", comment=b"private"),
        encode(colours(256, 256), "GIF", comment=b"x" * 70_000),
        encode(colours(256, 256), pnginfo=with_text("x" * 70_000)),
    ],
    ids=["JPEG", "GIF", "PNG"],
)
@pytest.mark.parametrize("inputs", [{"prompt_strength": 0}, {"mask": data_uri(colours(32, 32))}])
def test_comments_in_a_picture_are_not_in_the_output(server, content, inputs) -> None:
    """A JPEG has room for 65533 bytes of them."""
    output = {"output_format": "jpg", **SMALL, **UNCHECKED}
    image = server.generate(image=data_uri(content), **output, **inputs).image
    assert (image.format, image.info.get("comment")) == ("JPEG", None)


def kinds_of_pictures() -> dict[str, tuple[bytes, Image.Image]]:
    """Files of every sort, each with the RGB picture that it shows."""
    rgb, size = colours(48, 32), (48, 32)
    grey = rgb.convert("L")
    ramp = np.linspace(0, 65535, 48 * 32).reshape(32, 48).round().astype(np.uint16)
    eight_bit = Image.fromarray(np.rint(ramp / 257).astype(np.uint8))
    see_through = rgb.convert("RGBA")
    see_through.putalpha(Image.new("L", size, 0))
    half = Image.new("RGBA", size, (200, 0, 0, 255))
    half.paste((0, 0, 0, 0), (0, 0, 24, 32))
    half_shown = Image.new("RGB", size, (200, 0, 0))
    half_shown.paste("white", (0, 0, 24, 32))
    palette = rgb.quantize(16)
    frames = {"save_all": True, "append_images": [Image.new("RGB", size, "red")] * 2}
    return {
        "grey": (encode(grey), grey),
        "one bit": (encode(grey.convert("1")), grey.convert("1")),
        "palette": (encode(palette), palette),
        "16 bit": (encode(Image.fromarray(ramp)), eight_bit),
        "32 bit, small": (encode(Image.fromarray(np.asarray(grey, "i4")), "TIFF"), grey),
        "float": (encode(Image.fromarray((ramp / 65535).astype("f4")), "TIFF"), eight_bit),
        "CMYK": (encode(rgb.convert("CMYK"), "TIFF"), rgb.convert("CMYK")),
        "invisible": (encode(see_through), Image.new("RGB", size, "white")),
        "half visible": (encode(half), half_shown),
        "palette with transparency": (encode(half.quantize(8)), half_shown),
        "grey with alpha": (encode(half.convert("LA")), half_shown.convert("L")),
        "animation": (encode(rgb.quantize(16), "GIF", **frames), palette),
        "lossless webp": (encode(rgb, "WEBP", lossless=True), rgb),
        "bmp": (encode(rgb, "BMP"), rgb),
    }


@pytest.mark.parametrize("kind", kinds_of_pictures())
def test_any_picture_that_pillow_reads(server, kind: str) -> None:
    content, shown = kinds_of_pictures()[kind]
    assert difference(round_trip(server, content), shown) < 1


def bomb() -> bytes:
    """A small PNG whose header claims 20,000 x 20,000 pixels."""
    content = bytearray(encode(Image.new("1", (8, 8))))
    content[16:24] = (20_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


def deceptive_icon() -> bytes:
    """An icon of 16 x 16 pixels by its directory, with a PNG of 9000 x 9000 in it."""
    content = encode(Image.new("1", (9000, 9000)))
    entry = struct.pack("<4B2H2I", 16, 16, 0, 0, 1, 32, len(content), 22)
    return struct.pack("<3H", 0, 1, 1) + entry + content


@pytest.mark.parametrize("name", ["image", "mask"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (data_uri(b"<html>not found</html>"), "cannot be read as an image"),
        (data_uri(b""), "cannot be read as an image"),
        (data_uri(encode(colours(64, 64))[:-200]), "cannot be read as an image"),
        (data_uri(encode(colours(64, 64), "JPEG")[:-200]), "cannot be read as an image"),
        (data_uri(bomb()), "limit of 64 megapixels; send a smaller image"),
        (data_uri(encode(Image.new("1", (1, 70_000)))), "at most 65535 a side are read"),
        (data_uri(encode(colours(8, 8), "EPS")), "it is in no known format"),
        ("/etc/hostname", "'/etc/hostname' is neither a URL (http://"),
        ("file:///etc/hostname", "is neither a URL"),
        ("HTTPS://u:p@host/a.png?X-Amz-Signature=s", "'HTTPS://host/a.png' is neither a URL"),
        ("", "'' is neither a URL"),
        (data_uri(deceptive_icon()), "limit of 64 megapixels; send a smaller image"),
    ],
    ids=[
        "html",
        "empty",
        "cut_png",
        "cut_jpeg",
        "bomb",
        "long",
        "eps",
        "path",
        "file_url",
        "signed",
        "blank",
        "icon",
    ],
)
def test_unusable_pictures_give_a_clear_error(server, name, given, message) -> None:
    pictures = {"image": data_uri(colours(32, 32)), "mask": data_uri(colours(32, 32)), name: given}
    error = server.fail(**pictures)
    assert f"{name}: " in error
    assert message in error


@pytest.mark.parametrize("model", ["dev", "schnell"])
@pytest.mark.parametrize("steps", [1, 4])
def test_strength_decides_whether_the_picture_matters(server, model, steps) -> None:
    first, second = (data_uri(colours(256, 256, shift)) for shift in (0, 128))
    inputs = {"model": model, "num_inference_steps": steps, **RAW}

    def generate(image: str, strength: float) -> Image.Image:
        return server.generate(image=image, prompt_strength=strength, **inputs).image

    assert difference(generate(first, 0.8), generate(second, 0.8)) > 0.5
    assert same(generate(first, 1.0), generate(second, 1.0))


def test_the_pictures_of_past_requests_do_not_stay_in_memory(server) -> None:
    """Distinct ones of 2 MB each, sent as data URIs; they are refused, which is quick."""
    (worker,) = processes(b"_run_worker", f"FLUX_OUTPUT_DIRECTORY={server.outputs}")

    def sent(count: int) -> int:
        for _ in range(count):
            server.fail(image=data_uri(os.urandom(2_000_000)), **SMALL)
        return resident(worker)

    before = sent(15)  # so that what the first ones allocate is there already
    assert sent(80) - before < 80_000_000  # the URIs alone have 213 MB
