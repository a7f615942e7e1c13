"""What the inputs do to a picture: guidance, strength, masks, adapters and float8."""

import logging
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from miniature.evaluation.cases import SMALL, Case, cases, rendered
from miniature.evaluation.measure import halves, hollow, measure
from miniature.evaluation.painter import ADAPTERS, Painter, data_uri

logger = logging.getLogger(__name__)

GUIDANCE = (0, 1.5, 3, 6, 10)
STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)
SCALES = (-1, 0, 0.5, 1, 1.5)
TRIGGERS = {"inverted": "TOK", "outline": "SKS"}  # adapters by file name
SHARE = 16  # one caption is asked here for so many of the evaluation's
MASKED = 1.3  # radii of an object: half the side of the square that is repainted about it

Row = dict[str, Any]


def guidance(painter: Painter, count: int) -> list[Row]:
    """The contrast of dev's pictures, and what it would be if they were the scenes' renders."""
    asked = cases("plain", few(count))
    rows = []
    for scale in GUIDANCE:
        images = painter.generate([{**case.inputs, "guidance_scale": scale} for case in asked])
        truths = [case.truth(scale) for case in asked]
        rows.append(
            {
                "guidance_scale": scale,
                "contrast": _mean(map(contrast, images, asked)),
                "of renders": _mean(map(contrast, truths, asked)),
            }
        )
    return rows


def strength(painter: Painter, count: int) -> list[Row]:
    """Image to image: from the render of one scene to the caption of another."""
    wanted = cases("plain", few(count))
    given = [*wanted[1:], wanted[0]]
    rows = []
    for share in STRENGTHS:
        images = painter.generate(
            [
                {**_untouched_size(new), "image": data_uri(old.truth()), "prompt_strength": share}
                for new, old in zip(wanted, given, strict=True)
            ]
        )
        found = [measure(image) for image in images]
        new_colours = [
            (m.background == new.scene.background[0], m.colour == new.scene.objects[0].colour)
            for m, new in zip(found, wanted, strict=True)
        ]
        old_colours = [
            (m.background == old.scene.background[0], m.colour == old.scene.objects[0].colour)
            for m, old in zip(found, given, strict=True)
        ]
        rows.append(
            {
                "prompt_strength": share,
                "distance to the picture (of 255)": _mean(
                    np.abs(_eight_bit(image) - _eight_bit(old.truth())).mean()
                    for image, old in zip(images, given, strict=True)
                ),
                "colours of the prompt %": _percentage(new_colours),
                "colours of the picture %": _percentage(old_colours),
            }
        )
    return rows


def inpainting(painter: Painter, count: int) -> list[Row]:
    """The second object of a pair, painted into a picture of the first."""
    asked = cases("pair", few(count))
    rows = []
    for share in (0.8, 1.0):
        firsts = [_without_second(case) for case in asked]
        masks = [_mask(case) for case in asked]
        images = painter.generate(
            [
                {
                    **_untouched_size(case),
                    "image": data_uri(first),
                    "mask": data_uri(mask),
                    "prompt_strength": share,
                }
                for case, first, mask in zip(asked, firsts, masks, strict=True)
            ]
        )
        found = [
            measure(halves(image, case.scene.relation)[1])
            for image, case in zip(images, asked, strict=True)
        ]
        wanted = [case.scene.objects[1] for case in asked]
        kept = [
            np.abs(_eight_bit(image) - _eight_bit(first))[np.asarray(mask) == 0].max()
            for image, first, mask in zip(images, firsts, masks, strict=True)
        ]
        pairs = list(zip(found, wanted, strict=True))
        rows.append(
            {
                "prompt_strength": share,
                "captions": len(asked),
                "named colour in the mask %": _percentage([m.colour == t.colour for m, t in pairs]),
                "named shape in the mask %": _percentage([m.shape == t.shape for m, t in pairs]),
                "largest change outside (of 255)": float(max(kept)),
            }
        )
    return rows


def adapters(painter: Painter, count: int) -> list[Row]:
    """Each style by its own measure, at several scales, and beside the other."""
    missing = [name for name in TRIGGERS if not (ADAPTERS / f"{name}.safetensors").is_file()]
    if missing:
        logger.warning("adapters: skipped, %s holds no %s", ADAPTERS, " and no ".join(missing))
        return []
    asked = cases("plain", max(2, few(count) // 2))
    rows = []
    for style in TRIGGERS:
        for go_fast in (False, True):
            row: Row = {
                "adapter": style,
                "weights": "fp8" if go_fast else "bf16",
                "measured": {"inverted": "contrast", "outline": "hollow"}[style],
            }
            for scale in SCALES:
                inputs = {**adapter_inputs(style), "lora_scale": scale, "go_fast": go_fast}
                row[f"scale {scale}"] = _style_effect(painter, asked, style, (style,), inputs)
            both = {**adapter_inputs("inverted", "outline"), "go_fast": go_fast}
            row["both at 1"] = _style_effect(painter, asked, style, tuple(TRIGGERS), both)
            rows.append(row)
    return rows


def go_fast(painter: Painter, count: int) -> list[Row]:
    """The same requests in bf16 and with float8 weights."""
    asked = cases("plain", few(count))
    rows = []
    for model, steps in (("dev", 28), ("schnell", 4)):
        options = {"model": model, "num_inference_steps": steps, "guidance_scale": 3}
        plain, fast = (
            painter.generate([{**case.inputs, **options, "go_fast": fp8} for case in asked])
            for fp8 in (False, True)
        )
        found = [(measure(one), measure(other)) for one, other in zip(plain, fast, strict=True)]
        ratios = [psnr(one, other) for one, other in zip(plain, fast, strict=True)]
        rows.append(
            {
                "model": model,
                "captions": len(asked),
                "same background %": _percentage([a.background == b.background for a, b in found]),
                "same colour %": _percentage([a.colour == b.colour for a, b in found]),
                "same shape %": _percentage([a.shape == b.shape for a, b in found]),
                "median PSNR dB": round(statistics.median(ratios), 1),
                "least PSNR dB": round(min(ratios), 1),
            }
        )
    return rows


def few(count: int) -> int:
    """How many captions are asked where each is generated several times."""
    return max(2, count // SHARE)


def contrast(image: Image.Image, case: Case) -> float:
    """The slope of a picture's pixels, about mid grey, on those of its scene.

    1: the scene; below, paler, and above, more vivid; -1: its negative; 0: nothing like it.
    """
    pixels, truth = (_eight_bit(each) / 127.5 - 1 for each in (image, case.truth()))
    return float((pixels * truth).sum() / np.square(truth).sum())


def psnr(one: Image.Image, other: Image.Image) -> float:
    """The peak signal-to-noise ratio of two 8-bit pictures, dB, at most 99."""
    error = float(np.square(_eight_bit(one) - _eight_bit(other)).mean())
    return min(99.0, 10 * float(np.log10(255**2 / error))) if error else 99.0


def adapter_inputs(main: str, extra: str | None = None) -> dict[str, str]:
    """The committed adapters as inputs, sent inline as any caller may."""
    names = {"replicate_weights": main} | ({"extra_lora": extra} if extra else {})
    return {key: data_uri(ADAPTERS / f"{name}.safetensors") for key, name in names.items()}


def styled(caption: str, *styles: str) -> str:
    """A caption with the trigger words of styles."""
    return ", ".join((caption.rstrip("."), *(f"in the style of {TRIGGERS[s]}" for s in styles)))


def _style_effect(
    painter: Painter,
    asked: Sequence[Case],
    measured: str,
    styles: Sequence[str],
    inputs: dict[str, Any],
) -> float:
    requests = [
        {**case.inputs, **inputs, "prompt": styled(case.caption, *styles)} for case in asked
    ]
    images = painter.generate(requests)
    if measured == "inverted":
        return _mean(map(contrast, images, asked))
    return _mean(hollow(measure(image)) for image in images)


def _untouched_size(case: Case) -> dict[str, Any]:
    """A case's inputs for a request whose image sets the size."""
    return {"prompt": case.caption, "seed": case.seed, "megapixels": "0.25"}


def _without_second(case: Case) -> Image.Image:
    scene = case.scene
    return rendered(replace(scene, objects=scene.objects[:1]), SMALL)


def _mask(case: Case) -> Image.Image:
    """White in a square about the second object."""
    mask = Image.new("L", case.truth().size)
    thing = case.scene.objects[1]
    x, y = thing.x * mask.width, thing.y * mask.height
    reach = MASKED * thing.radius * min(mask.size)
    ImageDraw.Draw(mask).rectangle((x - reach, y - reach, x + reach, y + reach), fill=255)
    return mask


def _eight_bit(image: Image.Image) -> NDArray[np.float64]:
    return np.asarray(image.convert("RGB"), np.float64)


def _mean(values: Any) -> float:
    return round(float(np.mean(list(values))), 2)


def _percentage(right: Sequence[Any]) -> float:
    return round(100 * float(np.mean(right)), 1)
