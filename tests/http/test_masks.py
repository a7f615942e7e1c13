"""Masks over HTTP: what is kept is the picture itself, to the bit."""

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from tests.flux.test_images import COLOURS, P3, expected, patches, picture, rgb_profile
from tests.support.inputs import SMALL, UNCHECKED
from tests.support.pictures import colours, data_uri, difference, pixels, same

RAW = {"output_format": "png", **SMALL, **UNCHECKED}


def ring(mask: Image.Image, outer: int, inner: int) -> np.ndarray:
    """The painted pixels whose distance to what is kept is more than `outer`, up to `inner`."""
    painted = [mask.filter(ImageFilter.MinFilter(2 * d + 1)) for d in (outer, inner)]
    return (np.asarray(painted[0]) > 0) & (np.asarray(painted[1]) == 0)


def test_what_the_mask_keeps_is_the_picture_itself(server, photograph) -> None:
    picture = photograph.resize((272, 304))  # not whole tokens of the miniature's VAE
    mask = Image.new("L", picture.size, "black")
    ImageDraw.Draw(mask).ellipse((60, 60, 200, 220), fill="white")
    generated = server.generate(image=data_uri(picture), mask=data_uri(mask), **RAW).image
    kept = np.asarray(mask) == 0
    changed = np.abs(pixels(generated) - pixels(picture)).max(-1)
    assert (changed[kept] == 0).all()
    middle = changed[100:180, 90:170]
    assert (middle > 0).mean() > 0.9
    rim, within = ring(mask, 0, 1), ring(mask, 8, 12)
    assert 0 < changed[rim].mean() < changed[within].mean() / 3  # a soft edge, inside


def test_a_black_mask_gives_the_picture_back(server, photograph) -> None:
    answer = server.generate(
        image=data_uri(photograph), mask=data_uri(Image.new("L", photograph.size)), **RAW
    )
    kept = server.generate(image=data_uri(photograph), prompt_strength=0, **RAW)
    assert same(answer.image, kept.image)
    assert "The mask is black everywhere: nothing is repainted" in answer.logs


def test_a_mask_in_the_alpha_channel(server, photograph) -> None:
    """Opaque white with a transparent hole, as editors save it: the hole is kept."""
    mask = Image.new("RGBA", photograph.size, "white")
    mask.paste((255, 255, 255, 0), (0, 0, photograph.width, photograph.height // 2))
    answer = server.generate(image=data_uri(photograph), mask=data_uri(mask), **RAW)
    kept = server.generate(image=data_uri(photograph), prompt_strength=0, **RAW).image
    top = (0, 0, kept.width, kept.height // 2 - 16)
    assert same(answer.image.crop(top), kept.crop(top))
    assert not same(answer.image, kept)


def test_the_kept_area_has_the_colours_of_the_profile(server) -> None:
    """What a caller sees where nothing is repainted is the converted picture, without a profile."""
    buffer = io.BytesIO()
    picture().save(buffer, "PNG", icc_profile=rgb_profile(P3))
    image = picture()
    black = data_uri(Image.new("L", image.size))
    answer = server.generate(image=data_uri(buffer.getvalue()), mask=black, **RAW)
    assert np.abs(patches(answer.image) - expected(np.array(COLOURS), P3)).max() < 2
    assert "icc_profile" not in answer.image.info


def test_grey_blends(server) -> None:
    picture = colours(256, 256)

    def paint(value: int) -> np.ndarray:
        mask = data_uri(Image.new("L", picture.size, value))
        return pixels(server.generate(image=data_uri(picture), mask=mask, **RAW).image)

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
    generated = {
        name: server.generate(image=picture, mask=data_uri(m), **RAW).image
        for name, m in variants.items()
    }
    assert all(same(image, generated["plain"]) for image in generated.values())
    small = server.generate(image=picture, mask=data_uri(mask.resize((4, 4), 0)), **RAW).image
    assert (pixels(small)[:, :32] == pixels(colours(128, 128))[:, :32]).all()
    assert difference(small, colours(128, 128)) > 1


def test_mask_without_image_is_an_error(server) -> None:
    assert "mask: given without image" in server.fail(mask=data_uri(colours(32, 32)))
