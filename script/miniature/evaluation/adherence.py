"""How often a picture shows what its caption says, and how well that can be measured."""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from miniature.evaluation.cases import SIZES, TURNS, Case, cases
from miniature.evaluation.measure import Measurement, colours, halves, measure
from miniature.evaluation.painter import SECONDS, Painter
from miniature.training.world import Scene

STEPS = {"dev": 28, "schnell": 4}
BLUR, NOISE = 0.01, 10.0  # by the shorter side; of 255
PAIRS = 0.3  # so many pairs for each single object

Row = dict[str, Any]
Scores = dict[str, Any]  # names to percentages


def measure_itself(painter: Painter, count: int) -> list[Row]:
    """The measure on renders at every size, also blurred and noisy; and on the wrong captions."""
    plain, pairs = cases("plain", count, TURNS), cases("pair", _pairs(count), TURNS)
    rows = []
    for name, spoil in (
        ("renders", lambda image, _: image),
        ("renders, blurred and noisy", _spoil),
    ):
        for size in SIZES:
            singles = [case for case in plain if case.size == size]
            doubles = [case for case in pairs if case.size == size]
            rows.append(
                {"pictures": name, "size": size, "captions": len(singles)}
                | _single_scores(singles, [spoil(case.truth(), case.seed) for case in singles])
                | _pair_scores(doubles, [spoil(case.truth(), case.seed) for case in doubles])
            )
    dev, devs_pairs = (
        painter.generate([{**case.inputs, **_model("dev")} for case in some])
        for some in (plain, pairs)
    )
    rows.append(
        {"pictures": "dev's, against all other captions", "size": "all", "captions": len(plain)}
        | _single_scores(plain, dev, others=True)
        | _pair_scores(pairs, devs_pairs, others=True)
    )
    return rows


def prompts(painter: Painter, count: int) -> list[Row]:
    """One object on a flat background, dev and schnell."""
    return _by_size(painter, cases("plain", count, TURNS), _single_scores)


def pairs(painter: Painter, count: int) -> list[Row]:
    """Two objects on a flat background, dev and schnell."""
    return _by_size(painter, cases("pair", _pairs(count), TURNS), _pair_scores)


def _by_size(painter: Painter, asked: Sequence[Case], scores: Any) -> list[Row]:
    """A row for every size and one for all, for both models, and their difference in points."""
    rows, totals = [], {}
    for model, steps in STEPS.items():
        images = painter.generate([{**case.inputs, **_model(model)} for case in asked])
        generated = list(zip(asked, images, strict=True))
        for size in (*SIZES, "all"):
            some = [pair for pair in generated if size in (pair[0].size, "all")]
            if not some:
                continue
            measured = scores([case for case, _ in some], [image for _, image in some])
            seconds = statistics.median(float(image.info[SECONDS]) for _, image in some)
            row = {"model": model, "steps": steps, "size": size, "captions": len(some)}
            rows.append(row | measured | {"median seconds": round(seconds, 1)})
        totals[model] = measured
    difference = {
        name: round(value - totals["dev"][name], 1) for name, value in totals["schnell"].items()
    }
    empty = {"model": "schnell minus dev", "steps": "", "size": "all", "captions": len(asked)}
    return [*rows, empty | difference | {"median seconds": ""}]


def _pairs(count: int) -> int:
    return max(2, round(PAIRS * count))


def _model(name: str) -> dict[str, Any]:
    return {"model": name, "num_inference_steps": STEPS[name], "guidance_scale": 3}


def _single_scores(
    asked: Sequence[Case], images: Sequence[Image.Image], *, others: bool = False
) -> Scores:
    """Percentages right; with `others`, of every picture beside every caption but its own."""
    found = [measure(image) for image in images]
    right = [
        _single_right(measurement, case.scene)
        for i, measurement in enumerate(found)
        for j, case in enumerate(asked)
        if (i != j) == others
    ]
    names = ("background %", "object's colour %", "shape %", "all three %")
    return _percentages(names, [(*each, all(each)) for each in right])


def _single_right(found: Measurement, scene: Scene) -> tuple[bool, ...]:
    (thing,), (background,) = scene.objects, scene.background
    return found.background == background, found.colour == thing.colour, found.shape == thing.shape


def _pair_scores(
    asked: Sequence[Case], images: Sequence[Image.Image], *, others: bool = False
) -> Scores:
    """Percentages right; with `others`, of every picture beside every caption but its own."""
    found = [
        (
            measure(image).background,
            set(colours(image)),
            {way: tuple(map(measure, halves(image, way))) for way in ("beside", "below")},
        )
        for image in images
    ]
    right = []
    for i, (background, shown, by_way) in enumerate(found):
        for j, case in enumerate(asked):
            if (i != j) == others:
                things, parts = case.scene.objects, by_way[case.scene.relation]
                named = {thing.colour for thing in things}
                placed = [part.colour == t.colour for part, t in zip(parts, things, strict=True)]
                shaped = [part.shape == t.shape for part, t in zip(parts, things, strict=True)]
                both = named <= shown - {background} and (len(named) == 2 or all(placed))
                right.append(
                    (background == case.scene.background[0], both, all(placed), all(shaped))
                )
    names = ("pair: background %", "both colours %", "each in its place %", "both shapes %")
    return _percentages(names, right)


def _percentages(names: Sequence[str], right: Sequence[Sequence[bool]]) -> Scores:
    """The mean of each column; None where there are no rows."""
    if not right:
        return dict.fromkeys(names)
    means = np.mean(right, axis=0) * 100
    return {name: round(float(mean), 1) for name, mean in zip(names, means, strict=True)}


def _spoil(image: Image.Image, seed: int) -> Image.Image:
    """A picture as a small model might generate it: soft, and with grain."""
    soft = image.filter(ImageFilter.GaussianBlur(BLUR * min(image.size)))
    grain = np.random.default_rng(seed).normal(0, NOISE, (image.height, image.width, 3))
    return Image.fromarray((np.asarray(soft) + grain).clip(0, 255).astype(np.uint8))
