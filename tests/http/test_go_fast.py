"""go_fast over HTTP: every mode, both models, with and without adapters, beside bf16."""

import pytest
from PIL import Image
from safetensors.torch import save

from tests.support.adapters import adapter
from tests.support.inputs import UNCHECKED
from tests.support.pictures import colours, data_uri, difference, same
from tests.support.server import LoggedServer

RAW = {"output_format": "png", **UNCHECKED}
PICTURE = colours(256, 192)
MASK = Image.linear_gradient("L").resize(PICTURE.size)
MODES = {
    "txt2img": {},
    "img2img": {"image": data_uri(PICTURE)},
    "inpaint": {"image": data_uri(PICTURE), "mask": data_uri(MASK)},
}
SIZED = {"image": data_uri(PICTURE), "prompt_strength": 1.0}  # smaller than any ratio's size
CUSTOM = {"aspect_ratio": "custom", "width": 288, "height": 256, "megapixels": None}


@pytest.fixture(scope="module")
def style() -> str:
    return data_uri(save(adapter(1)))


def generate(server: LoggedServer, **inputs: object) -> Image.Image:
    return server.generate(**RAW, **inputs).image


@pytest.mark.parametrize("model", ["dev", "schnell"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_close_to_bf16_and_neither_disturbs_the_other(
    server, style, mode: str, model: str
) -> None:
    inputs = {"model": model, **MODES[mode]}
    exact = generate(server, **inputs)
    fast = generate(server, **inputs, go_fast=True)
    assert 0 < difference(fast, exact) < 4
    adapted = generate(server, **inputs, go_fast=True, replicate_weights=style)
    assert difference(adapted, fast) > 2 * difference(fast, exact)
    same_scale = generate(server, **inputs, replicate_weights=style, lora_scale=1.5)
    assert difference(adapted, same_scale) < difference(adapted, fast) / 2
    assert same(generate(server, **inputs), exact)
    assert same(generate(server, **inputs, go_fast=True), fast)


def test_scales_in_float8(server, style) -> None:
    def fast(**inputs: object) -> Image.Image:
        return generate(server, go_fast=True, **SIZED, **inputs)

    base, full = fast(), fast(replicate_weights=style)
    half = fast(replicate_weights=style, lora_scale=0.5)
    assert difference(half, full) > 0.5
    assert difference(half, base) > 0.5
    assert same(fast(replicate_weights=style, lora_scale=0), base)
    quarters = {"lora_scale": 0.25, "extra_lora_scale": 0.25}
    assert same(fast(replicate_weights=style, extra_lora=style, **quarters), half)
    other = data_uri(save(adapter(2)))
    both = fast(replicate_weights=style, extra_lora=other)
    assert difference(both, full) > 0.5
    assert same(fast(replicate_weights=other, extra_lora=style), both)


def test_a_custom_size_runs_in_bf16_and_says_so(server, style) -> None:
    answer = server.generate(**RAW, **CUSTOM, go_fast=True)
    assert "go_fast is ignored: custom sizes run in bf16" in answer.logs
    assert same(answer.image, generate(server, **CUSTOM))
    adapted = generate(server, **CUSTOM, go_fast=True, replicate_weights=style)
    assert same(adapted, generate(server, **CUSTOM, replicate_weights=style))


def test_with_an_image_custom_stays_in_float8(server) -> None:
    inputs = {**CUSTOM, **MODES["img2img"]}
    answer = server.generate(**RAW, **inputs, go_fast=True)
    assert "go_fast is ignored" not in answer.logs
    assert same(answer.image, generate(server, **MODES["img2img"], go_fast=True))
    assert not same(answer.image, generate(server, **inputs))


def test_image_k_is_the_image_of_seed_plus_k(server, style) -> None:
    inputs = {"go_fast": True, "replicate_weights": style, **SIZED}
    images = server.generate(**RAW, **inputs, num_outputs=2, seed=3).images
    assert same(images[1], generate(server, **inputs, seed=4))


def test_the_log_says_what_float8_is_good_for_here(server) -> None:
    assert any("saves memory, not time" in line for line in server.lines)
