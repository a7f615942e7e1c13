"""The rules of the inputs, without torch."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from flux.request import Inputs, Mode, Request, RequestError, make_request
from weights.serving.settings import Settings

SIZES = {  # the contract's, at one megapixel
    "1:1": (1024, 1024),
    "16:9": (1344, 768),
    "21:9": (1536, 640),
    "3:2": (1216, 832),
    "2:3": (832, 1216),
    "4:5": (896, 1088),
    "5:4": (1088, 896),
    "3:4": (896, 1152),
    "4:3": (1152, 896),
    "9:16": (768, 1344),
    "9:21": (640, 1536),
}
CUSTOM = {"aspect_ratio": "custom", "width": 512, "height": 512}


def resolved(**inputs) -> Request:
    inputs = {"prompt": "a star", **inputs}
    return make_request(Inputs(**inputs), Settings())


@pytest.fixture
def picture(tmp_path):
    def write(width: int, height: int) -> Path:
        path = tmp_path / f"{width}x{height}.png"
        Image.new("RGB", (width, height), "teal").save(path)
        return path

    return write


@pytest.mark.parametrize("ratio", SIZES)
def test_preset_sizes(ratio: str) -> None:
    whole, quarter = (resolved(aspect_ratio=ratio, megapixels=m) for m in ("1", "0.25"))
    width, height = SIZES[ratio]
    assert (whole.width, whole.height) == (width, height)
    assert (quarter.width, quarter.height) == (width // 2, height // 2)


@pytest.mark.parametrize(
    ("given", "rounded"),
    [(256, 256), (263, 256), (264, 272), (271, 272), (500, 496), (1433, 1440), (1440, 1440)],
)
def test_custom_sizes_are_rounded_to_the_nearest_multiple_of_16(given: int, rounded: int) -> None:
    request = resolved(aspect_ratio="custom", width=given, height=1000)
    assert (request.width, request.height) == (rounded, 1008)


@pytest.mark.parametrize("given", [{}, {"width": 512}, {"height": 512}])
def test_custom_without_both_sides_is_an_error(given) -> None:
    with pytest.raises(RequestError, match="custom needs both width and height"):
        resolved(aspect_ratio="custom", **given)


@pytest.mark.parametrize(
    ("size", "megapixels", "expected"),
    [
        ((512, 600), "1", (512, 608)),
        ((100, 60), "1", (96, 64)),  # never scaled up
        ((1440, 1440), "1", (1440, 1440)),
        ((2880, 1440), "1", (1440, 720)),
        ((3000, 100), "1", (1440, 48)),
        ((4000, 3), "1", (1440, 16)),  # at least 16
        ((1, 1), "1", (16, 16)),
        ((1024, 1024), "0.25", (512, 512)),
        ((2048, 512), "0.25", (1024, 256)),
        ((512, 512), "0.25", (512, 512)),
    ],
)
def test_an_image_sets_the_size(picture, size, megapixels, expected) -> None:
    request = resolved(
        image=picture(*size), megapixels=megapixels, aspect_ratio="custom", width=256
    )
    assert (request.width, request.height) == expected
    assert request.image is not None
    assert request.image.size == expected


def test_modes(picture) -> None:
    image, mask = picture(64, 64), picture(32, 48)
    assert resolved().mode is Mode.TEXT_TO_IMAGE
    assert resolved(image=image).mode is Mode.IMAGE_TO_IMAGE
    request = resolved(image=image, mask=mask)
    assert request.mode is Mode.INPAINT
    assert request.mask is not None
    assert request.mask.size == (64, 64)
    with pytest.raises(RequestError, match="mask: given without image"):
        resolved(mask=mask)


@pytest.mark.parametrize("steps", range(1, 51))
def test_the_first_sigma_is_the_strength_for_every_number_of_steps(picture, steps: int) -> None:
    image = picture(64, 64)
    for strength in (0.01, 0.5, 0.8, 0.99, 1.0):
        sigmas = resolved(image=image, prompt_strength=strength, num_inference_steps=steps).sigmas
        assert sigmas[0] == strength
        assert len(sigmas) == max(1, round(steps * strength))
        assert list(sigmas) == sorted(set(sigmas), reverse=True)
        assert sigmas[-1] > 0
    assert resolved(image=image, prompt_strength=0, num_inference_steps=steps).sigmas == ()


def test_at_full_strength_the_sigmas_are_those_of_diffusers() -> None:
    for steps in range(1, 51):
        expected = [1 + k * (1 / steps - 1) / max(1, steps - 1) for k in range(steps)]
        request = resolved(num_inference_steps=steps, prompt_strength=0.3)  # no image: no effect
        assert request.sigmas == pytest.approx(expected, abs=1e-12)


def test_seeds() -> None:
    assert resolved(seed=0, num_outputs=3).seeds == (0, 1, 2)
    assert resolved(seed=5.0, num_outputs=2.0).seeds == (5, 6)
    assert resolved(seed=2**64 - 1, num_outputs=2).seeds == (2**64 - 1, 0)
    assert resolved(seed=float(2**70)).seeds == (0,)
    random = [resolved(seed=seed).seeds[0] for seed in (None, -1, -7) * 10]
    assert len(set(random)) == len(random)
    assert 2**24 < max(random) < 2**32


def test_precision(picture) -> None:
    assert resolved().precision == "bf16"
    assert resolved(go_fast=True).precision == "fp8"
    assert resolved(go_fast=True, **CUSTOM).precision == "bf16"
    assert resolved(go_fast=True, image=picture(64, 64), **CUSTOM).precision == "fp8"


def test_adapters_and_their_scales() -> None:
    both = {"replicate_weights": " a/b ", "extra_lora": "c/d", "extra_lora_scale": -0.5}
    assert resolved().adapters == ()
    assert resolved(replicate_weights=" ", extra_lora="").adapters == ()
    assert resolved(**both, lora_scale=0.8).adapters == (("a/b", 0.8), ("c/d", -0.5))
    assert resolved(extra_lora="c/d").adapters == (("c/d", 1.0),)
    assert resolved(**both, go_fast=True).adapters == (("a/b", 1.5), ("c/d", -0.75))
    assert resolved(**both, go_fast=True, **CUSTOM).adapters == (("a/b", 1.0), ("c/d", -0.5))


def test_the_default_adapter_stands_in_for_an_empty_main_one() -> None:
    def adapters(**inputs):
        return make_request(Inputs(prompt="", **inputs), Settings(), default_adapter="e/f").adapters

    assert adapters(lora_scale=0.5) == (("e/f", 0.5),)
    assert adapters(replicate_weights="a/b") == (("a/b", 1.0),)
    assert adapters(extra_lora="c/d") == (("e/f", 1.0), ("c/d", 1.0))


def test_guidance_is_for_dev_alone() -> None:
    assert resolved(guidance_scale=2.5).guidance == 2.5
    assert resolved(guidance_scale=2.5, model="schnell").guidance is None


@pytest.mark.parametrize("inputs", [{"model": "pro"}, {"aspect_ratio": "2:1"}])
def test_unknown_choices_are_named_where_no_schema_guards_them(inputs) -> None:
    (value,) = inputs.values()
    with pytest.raises(RequestError, match=f"{value!r} is not one of"):
        resolved(**inputs)


@pytest.mark.parametrize(
    ("inputs", "line"),
    [
        ({"width": 512}, "width and height are ignored"),
        ({**CUSTOM, "megapixels": "0.25"}, "megapixels is ignored"),
        ({**CUSTOM, "go_fast": True}, "go_fast is ignored"),
        ({"model": "schnell"}, "guidance_scale is ignored"),
        ({"prompt_strength": 0.3}, "prompt_strength is ignored: there is no image"),
        ({"output_format": "png", "output_quality": 3}, "output_quality is ignored"),
        ({"lora_scale": 2, "extra_lora": "a/b"}, "lora_scale is ignored: there is no replicate_w"),
        ({"extra_lora_scale": 2, "replicate_weights": "a/b"}, "extra_lora_scale is ignored"),
        ({"seed": 12}, "Using seed: 12"),
    ],
)
def test_inputs_without_effect_are_named_in_the_log(caplog, inputs, line: str) -> None:
    with caplog.at_level(logging.INFO):
        resolved(**inputs)
    assert line in caplog.text


def test_inputs_with_an_effect_are_not_named(picture, caplog) -> None:
    changed = {"prompt_strength": 0.3, "output_quality": 3, "lora_scale": 2, "extra_lora_scale": 2}
    inputs = Inputs(prompt="", image=picture(64, 64), extra_lora="a/b", **changed)
    with caplog.at_level(logging.INFO):
        make_request(inputs, Settings(), default_adapter="c/d")
    assert "ignored" not in caplog.text


@pytest.mark.parametrize(
    ("size", "inputs", "line"),
    [
        ((512, 512), {}, "megapixels has no effect"),
        ((512, 512), {"megapixels": "0.25"}, "megapixels has no effect"),
        ((1440, 1440), {}, "megapixels is exceeded: the image sets the size, 1440 x 1440"),
        ((1024, 1024), {}, None),
        ((1440, 1440), {"megapixels": "0.25"}, None),
        ((64, 64), {"prompt_strength": 0}, "prompt_strength 0 keeps the image as it is"),
    ],
)
def test_what_an_image_leaves_without_effect_is_named_in_the_log(
    picture, caplog, size, inputs, line
) -> None:
    with caplog.at_level(logging.INFO):
        resolved(image=picture(*size), **inputs)
    assert line in caplog.text if line else "megapixels" not in caplog.text


def test_safety_can_only_be_skipped_where_the_operator_allows_it(caplog) -> None:
    inputs = Inputs(prompt="", disable_safety_checker=True)
    assert not make_request(inputs, Settings()).check_safety
    with caplog.at_level(logging.INFO):
        assert make_request(inputs, Settings(allow_disable_safety_checker=False)).check_safety
    assert "disable_safety_checker is ignored" in caplog.text


def test_the_rules_do_without_torch() -> None:
    command = "import sys; import flux.request; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0
