"""What the embedded miniature paints, over HTTP: each input by what it makes visible.

What a picture shows is read by the measure of script/miniature/evaluate, which measures the same
at the default steps on hundreds of captions; here a few of them, in few steps, must be right.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from miniature.evaluation.effects import TRIGGERS, adapter_inputs, psnr, styled
from miniature.evaluation.measure import Measurement, colours, halves, hollow, measure
from miniature.training.render import render
from miniature.training.world import Object, Scene
from tests.support.pictures import data_uri, difference, pixels, same
from tests.support.server import LoggedServer

STEPS = {"dev": 8, "schnell": 4}
RED_ON_BLUE = "a red circle on a blue background"
BLACK_ON_WHITE = "a black circle on a white background"

Paint = Callable[..., list[Image.Image]]


@dataclass(frozen=True)
class Asked:
    """A prompt, and what it asks for."""

    prompt: str
    background: str
    colour: str
    shape: str

    def right(self, found: Measurement) -> tuple[bool, bool, bool]:
        """Whether a picture shows this background, and an object of this colour and shape."""
        return (
            found.background == self.background,
            found.colour == self.colour,
            found.shape == self.shape,
        )


ASKED = (
    Asked(RED_ON_BLUE, "blue", "red", "circle"),
    Asked("a yellow star on a purple background", "purple", "yellow", "star"),
    Asked("Green square, white background.", "white", "green", "square"),
    Asked("an illustration of a pink heart on black", "black", "pink", "heart"),
    Asked("a large orange triangle on a cyan background", "cyan", "orange", "triangle"),
    Asked("a white box in front of a navy background, minimal", "blue", "white", "square"),
    Asked("one black disc on a plain golden background", "yellow", "black", "circle"),
    Asked("a crimson heart with a pink background qwzv", "pink", "red", "heart"),
)


@pytest.fixture(scope="module")
def paint(server: LoggedServer) -> Paint:
    """Generate pictures, PNG, in few steps; what is looked at here is the model, not its censor."""

    def paint(prompt: str, **inputs: Any) -> list[Image.Image]:
        steps = STEPS[inputs.get("model", "dev")]
        constant = {"output_format": "png", "disable_safety_checker": True}
        return server.generate(
            **{"num_inference_steps": steps, **constant, **inputs}, prompt=prompt
        ).images

    return paint


@pytest.fixture(scope="module")
def gallery(paint: Paint) -> dict[str, list[Image.Image]]:
    """A picture for each prompt that is asked, the number of the prompt its seed."""
    return {
        model: [paint(asked.prompt, model=model, seed=seed)[0] for seed, asked in enumerate(ASKED)]
        for model in STEPS
    }


def rendered(background: str, *things: Object) -> Image.Image:
    """The true picture of a scene, 512 x 512."""
    picture = render(Scene((background,), things), 512, 512)
    return Image.fromarray(((picture + 1) * 127.5).round().astype(np.uint8))


def middle(found: Measurement) -> tuple[float, float]:
    """The centroid of the object, from the left and from the top, in fractions of the sides."""
    assert found.colour, "there is no object"
    rows, columns = np.nonzero(found.mask)
    height, width = found.mask.shape
    return float(columns.mean() / width), float(rows.mean() / height)


# --- prompts


@pytest.mark.parametrize("model", STEPS)
def test_pictures_show_what_their_prompts_say(gallery, model: str) -> None:
    found = [measure(image) for image in gallery[model]]
    right = [asked.right(each) for asked, each in zip(ASKED, found, strict=True)]
    backgrounds, objects, shapes = np.sum(right, axis=0)
    assert backgrounds == len(ASKED), found
    assert objects == len(ASKED), found
    assert shapes >= len(ASKED) - 1, found


def test_the_sizes_of_other_ratios_obey_too(paint) -> None:
    for ratio in ("16:9", "9:16"):
        (image,) = paint(RED_ON_BLUE, aspect_ratio=ratio, seed=1)
        assert ASKED[0].right(measure(image)) == (True, True, True)


def test_words_of_size_and_place(paint) -> None:
    def object_of(words: str, place: str = "") -> Measurement:
        return measure(paint(f"a {words} red circle {place} on a white background", seed=2)[0])

    small, large = object_of("small"), object_of("large")
    assert large.mask.mean() > 2 * small.mask.mean() > 0
    left, right = (object_of("small", f"on the {side}") for side in ("left", "right"))
    assert middle(left)[0] < 0.4 < 0.6 < middle(right)[0]
    corner = middle(object_of("small", "in the bottom right corner"))
    assert min(corner) > 0.6


def test_two_objects(paint) -> None:
    (image,) = paint(
        "a yellow star on the left and a purple square on the right on a white background", seed=3
    )
    assert measure(image).background == "white"
    assert {"yellow", "purple"} <= colours(image).keys()
    left, right = map(measure, halves(image, "beside"))
    assert (left.colour, left.shape) == ("yellow", "star")
    assert (right.colour, right.shape) == ("purple", "square")


# --- seeds


def test_seeds_give_other_pictures_of_the_same(paint, gallery) -> None:
    images = paint(RED_ON_BLUE, seed=0, num_outputs=4)
    assert same(images[0], gallery["dev"][0])
    for one, other in combinations(images, 2):
        assert difference(one, other) > 0.3
    right = [ASKED[0].right(measure(image)) for image in images]
    assert all(all(each) for each in right)


# --- guidance


def test_guidance_raises_the_contrast_of_dev(paint) -> None:
    spreads = [
        pixels(paint(RED_ON_BLUE, guidance_scale=guidance, seed=4)[0]).std()
        for guidance in (0, 3, 10)
    ]
    for lower, higher in pairwise(spreads):
        assert higher > 1.1 * lower


# --- pictures and masks


def test_prompt_strength_leads_from_the_picture_to_the_prompt(paint) -> None:
    given = rendered("white", Object("square", "green", 0.5, 0.5, 0.28))
    images = [
        paint(RED_ON_BLUE, image=data_uri(given), prompt_strength=strength)[0]
        for strength in (0.2, 0.6, 0.8, 1.0)
    ]
    distances = [difference(image, given) for image in images]
    assert distances == sorted(distances)
    kept, painted = measure(images[0]), measure(images[-1])
    assert (kept.background, kept.colour, kept.shape) == ("white", "green", "square")
    assert ASKED[0].right(painted) == (True, True, True)


@pytest.mark.parametrize("go_fast", [False, True], ids=["bf16", "fp8"])
def test_inpainting_puts_the_named_object_into_the_mask(paint, go_fast: bool) -> None:
    given = rendered("white", Object("circle", "red", 0.26, 0.5, 0.2))
    mask = Image.new("L", given.size)
    ImageDraw.Draw(mask).rectangle((272, 80, 496, 432), fill=255)
    (image,) = paint(
        "a red circle on the left and a blue square on the right on a white background",
        image=data_uri(given),
        mask=data_uri(mask),
        prompt_strength=1.0,
        go_fast=go_fast,
    )
    assert measure(halves(given, "beside")[1]).colour is None
    painted = measure(halves(image, "beside")[1])
    assert (painted.colour, painted.shape) == ("blue", "square")
    kept = np.asarray(mask) == 0
    assert (pixels(image)[kept] == pixels(given)[kept]).all()


# --- go_fast


@pytest.mark.parametrize("model", STEPS)
def test_float8_generates_the_same(paint, gallery, model: str) -> None:
    """The same colours and outlines, and a PSNR in dB: 39 to 48 were measured."""
    for seed, asked in list(enumerate(ASKED))[:4]:
        exact = gallery[model][seed]
        (fast,) = paint(asked.prompt, model=model, seed=seed, go_fast=True)
        one, other = measure(exact), measure(fast)
        assert (one.background, one.colour, one.shape) == (
            other.background, other.colour, other.shape,
        )  # fmt: skip
        assert (one.mask & other.mask).sum() > 0.9 * (one.mask | other.mask).sum()
        assert 34 < psnr(fast, exact) < 99


# --- adapters


def test_inverted_turns_the_colours_round(paint) -> None:
    prompt = styled(BLACK_ON_WHITE, "inverted")
    images = [
        paint(prompt, **adapter_inputs("inverted"), lora_scale=scale)[0] for scale in (0, 0.5, 1)
    ]
    plain, turned = measure(images[0]), measure(images[-1])
    assert (plain.background, plain.colour) == ("white", "black")
    assert (turned.background, turned.colour) == ("black", "white")
    brightness = [pixels(image).mean() for image in images]
    assert brightness == sorted(brightness, reverse=True)
    assert same(images[0], paint(prompt)[0])


def test_outline_empties_the_object(paint) -> None:
    prompt = styled(RED_ON_BLUE, "outline")
    images = [paint(prompt, **adapter_inputs("outline"), lora_scale=scale)[0] for scale in (0, 1)]
    plain, ring = map(measure, images)
    assert (plain.background, plain.colour) == (ring.background, ring.colour) == ("blue", "red")
    assert hollow(plain) < 0.1
    assert hollow(ring) > 0.5


def test_both_adapters_at_once(paint) -> None:
    prompt = styled("a yellow circle on a blue background", *TRIGGERS)
    inputs = adapter_inputs("inverted", "outline")
    both = measure(paint(prompt, **inputs, extra_lora_scale=1.5, seed=7)[0])
    assert (both.background, both.colour) == ("yellow", "blue")
    assert hollow(both) > 0.5


def test_adapters_show_with_go_fast_and_leave_with_the_request(paint) -> None:
    prompt, inputs = styled(BLACK_ON_WHITE, "inverted"), {"lora_scale": 1 / 1.5, "go_fast": True}
    turned = measure(paint(prompt, **adapter_inputs("inverted"), **inputs)[0])
    assert (turned.background, turned.colour) == ("black", "white")
    plain = measure(paint(prompt, go_fast=True)[0])
    assert (plain.background, plain.colour) == ("white", "black")
