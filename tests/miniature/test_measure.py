"""The measure of the miniature's pictures, on pictures whose content is known."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from miniature.evaluation import __main__ as evaluate
from miniature.evaluation import adherence, effects
from miniature.evaluation.cases import Case, cases, rendered
from miniature.evaluation.goals import goals
from miniature.evaluation.measure import cielab, colours, halves, hollow, measure
from miniature.evaluation.painter import ADAPTERS, NANO, digest
from miniature.training.render import colour, coverage, render
from miniature.training.world import COLOURS, PALETTE, SHAPES, Object, Scene, sample

pytestmark = pytest.mark.training

SIZE = 160  # pixels: cheap, and large enough for the smallest star


def pictures(count: int, kind: str = "plain") -> list[tuple[Scene, Image.Image]]:
    scenes = [sample(random.Random(number), kind, held_out=True) for number in range(count)]
    return [(scene, picture(scene)) for scene in scenes]


def picture(scene: Scene) -> Image.Image:
    pixels = render(scene, SIZE, SIZE)
    return Image.fromarray(((pixels + 1) * 127.5).round().astype(np.uint8))


def spoilt(image: Image.Image, blur: float, noise: float) -> Image.Image:
    soft = image.filter(ImageFilter.GaussianBlur(blur * SIZE))
    grain = np.random.default_rng(0).normal(0, noise, (SIZE, SIZE, 3))
    return Image.fromarray((np.asarray(soft) + grain).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("blur", "noise", "shapes"), [(0, 0, 0.99), (0.01, 10, 0.97), (0.015, 25, 0.95)]
)
def test_renders_are_read_rightly(blur: float, noise: float, shapes: float) -> None:
    shown = pictures(120)
    right = 0
    for scene, image in shown:
        found, (thing,) = measure(spoilt(image, blur, noise)), scene.objects
        assert (found.background, found.colour) == (scene.background[0], thing.colour)
        right += found.shape == thing.shape
    assert right / len(shown) >= shapes


def test_every_shape_and_colour_is_met_in_these_pictures() -> None:
    things = [scene.objects[0] for scene, _ in pictures(120)]
    assert {thing.shape for thing in things} == set(SHAPES)
    assert {thing.colour for thing in things} == set(COLOURS)


def test_captions_of_other_pictures_fall_to_chance() -> None:
    shown = pictures(150)
    found = [measure(image) for _, image in shown]
    matches = np.array(
        [
            (
                m.background == scene.background[0],
                m.colour == scene.objects[0].colour,
                m.shape == scene.objects[0].shape,
            )
            for i, m in enumerate(found)
            for j, (scene, _) in enumerate(shown)
            if i != j
        ]
    ).mean(0)
    chance = (0.17, 0.1, 0.2)  # a tenth of the backgrounds would be white, had all a name
    assert np.abs(matches - chance).max() < 0.05


def test_two_objects_are_found_in_their_halves() -> None:
    for scene, image in pictures(40, "pair"):
        named = {thing.colour for thing in scene.objects}
        assert set(colours(spoilt(image, 0.01, 10))) == {*named, *scene.background}
        for half, thing in zip(halves(image, scene.relation), scene.objects, strict=True):
            assert (measure(half).colour, measure(half).shape) == (thing.colour, thing.shape)


def test_no_object_and_no_shape() -> None:
    empty = measure(Image.new("RGB", (SIZE, SIZE), PALETTE["cyan"]))
    assert (empty.background, empty.colour, empty.shape) == ("cyan", None, None)
    bar = Image.new("RGB", (SIZE, SIZE), PALETTE["cyan"])
    bar.paste(PALETTE["red"], (20, 70, 140, 90))
    assert (measure(bar).colour, measure(bar).shape) == ("red", None)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_ring_is_hollow_and_a_filled_shape_is_not(shape: str) -> None:
    scene = Scene(("white",), (Object(shape, "blue", 0.5, 0.5, 0.38),))
    filled = render(scene, SIZE, SIZE)
    hole = coverage(shape, SIZE / 2, SIZE / 2, 0.55 * 0.38 * SIZE, 0, SIZE, SIZE)[..., None]
    ring = filled + hole * (colour("white") - filled)
    assert hollow(measure(filled)) == 0
    assert hollow(measure(ring)) > 0.8
    assert hollow(measure(Image.new("RGB", (SIZE, SIZE)))) == 0


def test_cielab_of_known_colours() -> None:
    """The values that CIE 15 gives for sRGB's white, mid grey and primaries, to a tenth."""
    rgb = np.array([(255, 255, 255), (119, 119, 119), (255, 0, 0), (0, 255, 0), (0, 0, 255)])
    expected = [
        (100, 0, 0), (50.0, 0, 0), (53.2, 80.1, 67.2), (87.7, -86.2, 83.2), (32.3, 79.2, -107.9)
    ]  # fmt: skip
    assert np.abs(cielab(rgb) - expected).max() < 0.1


def test_contrast_is_the_slope_on_the_scene() -> None:
    (case,) = cases("plain", 1)
    truth = case.truth()
    assert effects.contrast(truth, case) == pytest.approx(1)
    negative = truth.point([255 - value for value in range(256)] * 3)
    assert effects.contrast(negative, case) == pytest.approx(-1)
    assert effects.contrast(Image.new("RGB", truth.size, (128,) * 3), case) == pytest.approx(
        0, abs=0.02
    )
    slopes = [effects.contrast(case.truth(guidance), case) for guidance in effects.GUIDANCE]
    assert slopes == sorted(slopes)
    assert slopes[-1] - slopes[0] > 0.5


class Ideal:
    """Stands in for the predictor: it generates each caption's own scene."""

    def __init__(self, known: list[Case]) -> None:
        self._truth = {(case.caption, case.seed): case for case in known}

    def generate(self, requests):
        images = []
        for request in requests:
            case = self._truth[request["prompt"], request["seed"]]
            images.append(rendered(case.scene, case.size, request.get("guidance_scale", 3)))
            images[-1].info["seconds"] = "1"
        return images


def test_an_ideal_predictor_reaches_the_goals() -> None:
    count = 10
    sizes = adherence.TURNS
    painter = Ideal(
        [*cases("plain", count, sizes), *cases("pair", 3, sizes), *cases("plain", count)]
    )
    tables = {
        "prompts": adherence.prompts(painter, count),
        "pairs": adherence.pairs(painter, count),
    }
    assert all(row["met"] == "yes" for row in goals(tables))
    assert len(goals(tables)) == 7
    for row in (*tables["prompts"][:-1], *tables["pairs"][:-1]):
        assert all(value == 100 for name, value in row.items() if name.endswith("%"))


def test_the_table_is_replaced_in_place(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text(f"before\n{evaluate.START}\nold\n{evaluate.END}\nafter\n")
    text = evaluate.markdown(
        {
            "checkpoint": "abc",
            "parts": {"guidance": {"rows": [{"guidance_scale": 0, "contrast": 1}]}},
        }
    )
    for _ in range(2):
        file.write_text(evaluate.replaced(file, text))
    content = file.read_text()
    assert content.startswith("before\n")
    assert content.endswith("\nafter\n")
    assert content.count("| guidance_scale | contrast |") == 1
    assert "old" not in content
    file.write_text("no markers")
    with pytest.raises(ValueError, match="no place for the table"):
        evaluate.replaced(file, text)


def test_the_published_figures_are_of_the_committed_weights() -> None:
    report = json.loads((evaluate.ROOT / "docs/miniature.json").read_text())
    assert report["checkpoint"] == digest(NANO)
    assert report["adapters"] == digest(ADAPTERS)
    assert report["parts"].keys() == evaluate.PARTS.keys()
    assert all(part["captions"] >= 200 for part in report["parts"].values())
    assert evaluate.markdown(report) in (evaluate.ROOT / "weights/README.md").read_text()


def test_the_digest_tells_weights_from_adapters(tmp_path: Path) -> None:
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    (tmp_path / "model").write_bytes(b"1")
    (adapters / "style").write_bytes(b"1")
    before = digest(tmp_path), digest(adapters)
    (adapters / "style").write_bytes(b"2")
    after = digest(tmp_path), digest(adapters)
    assert (before[0] == after[0], before[1] == after[1]) == (True, False)
    (tmp_path / "model").write_bytes(b"2")
    assert digest(tmp_path) != before[0]
