"""What a caller observes, over HTTP from one running server."""

import io
import re
import shutil
import struct
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter
from serving.server import ServerError

from tests.flux.test_images import COLOURS, P3, expected, patches, picture, rgb_profile
from tests.support.inputs import PROMPT, SMALL
from tests.support.pictures import colours, data_uri, difference, encode, pixels, same

SCHNELL = {"model": "schnell", "num_inference_steps": 1}
RAW = {"output_format": "png", **SMALL}


# --- sizes


@pytest.mark.parametrize(
    ("inputs", "size"),
    [
        ({}, (512, 512)),
        ({"aspect_ratio": "21:9"}, (768, 320)),
        ({"aspect_ratio": "9:16"}, (384, 672)),
        ({"aspect_ratio": "16:9", "megapixels": None}, (1344, 768)),
        ({"aspect_ratio": "custom", "width": 300, "height": 264}, (304, 272)),
        ({"aspect_ratio": "custom", "width": 300.0, "height": 1440}, (304, 1440)),
        ({"width": 300, "height": 300}, (512, 512)),
    ],
)
def test_size(server, inputs, size) -> None:
    assert server.draw(**SCHNELL, **inputs).image.size == size


def test_custom_needs_width_and_height(server) -> None:
    error = server.fail(aspect_ratio="custom", width=512)
    assert "custom needs both width and height, got width=512, height=None" in error


@pytest.mark.parametrize(
    ("inputs", "line"),
    [
        ({"width": 300}, "width and height are ignored"),
        (SMALL, "megapixels is ignored"),
        (SCHNELL, "guidance_scale is ignored: schnell has no guidance embedding"),
    ],
)
def test_inputs_without_effect_are_named_in_the_log(server, inputs, line) -> None:
    assert line in server.draw(**inputs).logs


# --- input pictures


def round_trip(server, content: bytes | Image.Image, **inputs) -> Image.Image:
    """An input picture as it comes back at prompt_strength 0."""
    return server.draw(image=data_uri(content), prompt_strength=0, **RAW, **inputs).image


def test_an_image_sets_the_size_and_nothing_else_does(server, photograph) -> None:
    image = data_uri(encode(photograph, "JPEG"))
    answer = server.draw(image=image, aspect_ratio="custom", width=256, megapixels=None, **SCHNELL)
    assert answer.image.size == (512, 608)  # of 512 x 600; nearest multiples of 16
    assert "the image sets the size" in answer.logs
    assert server.draw(image=image, **SCHNELL).image.size == (480, 560)  # a quarter megapixel
    wide = data_uri(colours(2000, 100))
    assert server.draw(image=wide, megapixels=None, **SCHNELL).image.size == (1440, 80)


def test_strength_zero_gives_the_picture_back(server, photograph) -> None:
    small = photograph.resize((256, 304))
    assert same(round_trip(server, small), small)
    assert same(round_trip(server, small, model="schnell"), small)
    mask = data_uri(Image.new("L", small.size, "white"))
    assert same(round_trip(server, small, mask=mask), small)


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


# --- img2img


@pytest.mark.parametrize("model", ["dev", "schnell"])
@pytest.mark.parametrize("steps", [1, 4])
def test_strength_decides_whether_the_picture_matters(server, model, steps) -> None:
    first, second = (data_uri(colours(256, 256, shift)) for shift in (0, 128))
    inputs = {"model": model, "num_inference_steps": steps, **RAW}

    def draw(image: str, strength: float) -> Image.Image:
        return server.draw(image=image, prompt_strength=strength, **inputs).image

    assert difference(draw(first, 0.8), draw(second, 0.8)) > 0.5
    assert same(draw(first, 1.0), draw(second, 1.0))


# --- inpainting


def ring(mask: Image.Image, outer: int, inner: int) -> np.ndarray:
    """The painted pixels whose distance to what is kept is more than `outer`, up to `inner`."""
    painted = [mask.filter(ImageFilter.MinFilter(2 * d + 1)) for d in (outer, inner)]
    return (np.asarray(painted[0]) > 0) & (np.asarray(painted[1]) == 0)


def test_what_the_mask_keeps_is_the_picture_itself(server, photograph) -> None:
    picture = photograph.resize((272, 304))  # not whole tokens of the miniature's VAE
    mask = Image.new("L", picture.size, "black")
    ImageDraw.Draw(mask).ellipse((60, 60, 200, 220), fill="white")
    drawn = server.draw(image=data_uri(picture), mask=data_uri(mask), **RAW).image
    kept = np.asarray(mask) == 0
    changed = np.abs(pixels(drawn) - pixels(picture)).max(-1)
    assert (changed[kept] == 0).all()
    middle = changed[100:180, 90:170]
    assert (middle > 0).mean() > 0.9
    rim, within = ring(mask, 0, 1), ring(mask, 8, 12)
    assert 0 < changed[rim].mean() < changed[within].mean() / 3  # a soft edge, inside


def test_a_black_mask_gives_the_picture_back(server, photograph) -> None:
    answer = server.draw(
        image=data_uri(photograph), mask=data_uri(Image.new("L", photograph.size)), **RAW
    )
    kept = server.draw(image=data_uri(photograph), prompt_strength=0, **RAW)
    assert same(answer.image, kept.image)
    assert "The mask is black everywhere: nothing is repainted" in answer.logs


def test_a_mask_in_the_alpha_channel(server, photograph) -> None:
    """Opaque white with a transparent hole, as editors save it: the hole is kept."""
    mask = Image.new("RGBA", photograph.size, "white")
    mask.paste((255, 255, 255, 0), (0, 0, photograph.width, photograph.height // 2))
    answer = server.draw(image=data_uri(photograph), mask=data_uri(mask), **RAW)
    kept = server.draw(image=data_uri(photograph), prompt_strength=0, **RAW).image
    top = (0, 0, kept.width, kept.height // 2 - 16)
    assert same(answer.image.crop(top), kept.crop(top))
    assert not same(answer.image, kept)


def test_the_kept_area_has_the_colours_of_the_profile(server) -> None:
    """What a caller sees where nothing is repainted is the converted picture, without a profile."""
    buffer = io.BytesIO()
    picture().save(buffer, "PNG", icc_profile=rgb_profile(P3))
    image = picture()
    black = data_uri(Image.new("L", image.size))
    answer = server.draw(image=data_uri(buffer.getvalue()), mask=black, **RAW)
    assert np.abs(patches(answer.image) - expected(np.array(COLOURS), P3)).max() < 2
    assert "icc_profile" not in answer.image.info


def test_grey_blends(server) -> None:
    picture = colours(256, 256)

    def paint(value: int) -> np.ndarray:
        mask = data_uri(Image.new("L", picture.size, value))
        return pixels(server.draw(image=data_uri(picture), mask=mask, **RAW).image)

    black, grey, white = paint(0), paint(128), paint(255)
    assert (black == pixels(picture)).all()
    assert np.abs(grey - (black + white) / 2).max() <= 1.5


def test_masks_of_any_size_and_mode(server) -> None:
    picture = data_uri(colours(128, 128))
    mask = Image.new("L", (128, 128), 0)
    mask.paste(255, (64, 0, 128, 128))
    transparent = Image.new("RGBA", (128, 128), (255, 255, 255, 0))  # over black: keep
    transparent.paste((255, 255, 255, 255), (64, 0, 128, 128))
    variants = {
        "plain": mask,
        "one bit": mask.convert("1"),
        "palette": mask.convert("P"),
        "rgb": mask.convert("RGB"),
        "alpha": transparent,
    }
    drawn = {
        name: server.draw(image=picture, mask=data_uri(m), **RAW).image
        for name, m in variants.items()
    }
    assert all(same(image, drawn["plain"]) for image in drawn.values())
    small = server.draw(image=picture, mask=data_uri(mask.resize((4, 4), 0)), **RAW).image
    assert (pixels(small)[:, :32] == pixels(colours(128, 128))[:, :32]).all()
    assert difference(small, colours(128, 128)) > 1


def test_mask_without_image_is_an_error(server) -> None:
    assert "mask: given without image" in server.fail(mask=data_uri(colours(32, 32)))


# --- seeds, steps and guidance


def seeds_logged(logs: str) -> list[int]:
    return [int(seed) for seed in re.findall(r"Using seed: (\d+)", logs)]


def test_a_seed_reproduces_its_picture_and_zero_is_a_seed(server) -> None:
    zero, again, one = (server.draw(seed=seed, **RAW) for seed in (0, 0.0, 1))
    assert same(zero.image, again.image)
    assert difference(zero.image, one.image) > 1
    assert seeds_logged(zero.logs + again.logs + one.logs) == [0, 0, 1]


@pytest.mark.parametrize("given", [None, -1])
def test_without_a_seed_the_log_tells_the_random_one(server, given) -> None:
    first, second = (server.draw(seed=given, **SCHNELL, **RAW) for _ in range(2))
    assert not same(first.image, second.image)
    (seed,) = seeds_logged(first.logs)
    assert 0 <= seed < 2**32
    assert same(server.draw(seed=seed, **SCHNELL, **RAW).image, first.image)


def test_huge_seeds_work(server) -> None:
    answer = server.draw(seed=2**70 + 2**60, **SCHNELL, **RAW)
    (seed,) = seeds_logged(answer.logs)
    assert same(server.draw(seed=seed, **SCHNELL, **RAW).image, answer.image)


@pytest.mark.parametrize("mode", ["txt2img", "img2img", "inpaint"])
def test_image_k_is_the_single_image_of_seed_plus_k(server, mode: str) -> None:
    inputs = {**SCHNELL, **RAW}
    if mode != "txt2img":
        inputs["image"] = data_uri(colours(96, 112))
    if mode == "inpaint":
        inputs["mask"] = data_uri(Image.linear_gradient("L"))
    batch = server.draw(seed=41, num_outputs=4.0, **inputs)
    assert len(batch.images) == 4
    for k, image in enumerate(batch.images):
        assert same(image, server.draw(seed=41 + k, **inputs).image)


def test_schnell_knows_no_guidance(server) -> None:
    low, high = (server.draw(guidance_scale=g, **SCHNELL, **RAW).image for g in (2, 5))
    assert same(low, high)


def test_the_log_has_a_progress_line_for_every_step(server) -> None:
    logs = server.draw(num_inference_steps=6, num_outputs=2, **SMALL).logs
    for step in range(1, 7):
        assert len(re.findall(rf"\b{step}/6 \[", logs)) >= 2


# --- prompts


def test_the_prompt_may_be_empty(server) -> None:
    red, empty = (server.draw(prompt=prompt, **RAW).image for prompt in (PROMPT, ""))
    assert difference(red, empty) > 0.5


def test_dev_reads_512_tokens_and_schnell_256(server) -> None:
    start = "red " * 300
    for model, reads in (("dev", True), ("schnell", False)):
        inputs = {"model": model, **RAW}
        one, other = (server.draw(prompt=start + end, **inputs) for end in ("star", "heart"))
        assert same(one.image, other.image) is not reads
        assert ("T5 reads the first 256 tokens" in one.logs) is not reads
        assert (
            "CLIP reads the first 77 tokens of the prompt; T5 reads all of it" in one.logs
        ) is reads


# --- outputs

SIGNATURES = {"webp": b"RIFF", "jpg": b"\xff\xd8\xff", "png": b"\x89PNG"}


@pytest.mark.parametrize("output_format", SIGNATURES)
def test_formats_quality_and_files(server, output_format: str) -> None:
    files = []
    for quality in (0, 50, 100):
        answer = server.draw(output_format=output_format, output_quality=quality, **SMALL)
        files.append(answer.files[0])
        assert answer.files[0].startswith(SIGNATURES[output_format])
        (path,) = [p for p in server.outputs.rglob("*") if p.is_file()]  # earlier ones are gone
        assert path.suffix == f".{output_format}"
        assert path.read_bytes() == answer.files[0]
    sizes = [len(content) for content in files]
    if output_format == "png":
        assert files[0] == files[1] == files[2]
    else:
        assert sizes[0] < sizes[1] < sizes[2]


def test_metrics(server) -> None:
    metrics = server.draw(num_outputs=2).metrics
    assert metrics["image_output_count"] == 2
    assert metrics["megapixels"] == 0.25
    assert metrics["compiled"] == 0  # on a CPU
    stages = ("text", "adapters", "denoising", "decoding", "safety", "encoding")
    timing = metrics["timing"]
    assert all(0 <= timing[stage] <= metrics["predict_time"] for stage in stages)
    assert timing["denoising"] > 0
    assert sum(timing.values()) - timing["encoding"] < metrics["predict_time"]
    still = server.draw(image=data_uri(colours(64, 64)), prompt_strength=0).metrics["timing"]
    assert still["input"] > 0
    assert still["denoising"] == 0


# --- validation


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        ({"prompt": None}, "prompt"),
        ({"num_outputs": 5}, "num_outputs"),
        ({"width": 128}, "width"),
        ({"prompt_strength": 1.1}, "prompt_strength"),
        ({"num_inference_steps": 2.5}, "num_inference_steps"),
        ({"aspect_ratio": "2:1"}, "aspect_ratio"),
        ({"output_quality": 101}, "output_quality"),
    ],
)
def test_the_schema_is_enforced(server, inputs, named: str) -> None:
    with pytest.raises(ServerError, match=f"HTTP 422.*{named}"):
        server.predict(**inputs)


def test_an_output_directory_that_vanishes_is_made_anew(server) -> None:
    server.draw()
    for directory in server.outputs.iterdir():
        shutil.rmtree(directory)
    assert server.draw().image.size == (512, 512)


def test_the_server_is_healthy_while_it_draws(server) -> None:
    def look() -> None:
        seen.append(server.server.request("GET", "/health-check").json())

    seen: list[dict[str, object]] = []
    draws = threading.Thread(target=server.draw, kwargs={"num_inference_steps": 50, **SMALL})
    draws.start()
    while draws.is_alive():
        look()
    draws.join()
    assert "BUSY" in {health["status"] for health in seen}
    assert {health["status"] for health in seen} <= {"BUSY", "READY"}
    assert not any("user_healthcheck_error" in health for health in seen)


def test_the_server_survives_all_of_the_above(server) -> None:
    assert server.draw().image.size == (512, 512)
    for _ in range(50):  # BUSY for a moment after an answer, like the 409 between predictions
        health = server.server.request("GET", "/health-check").json()["status"]
        if health != "BUSY":
            break
        time.sleep(0.1)
    assert health == "READY"
