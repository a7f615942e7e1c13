"""A contact sheet of what the miniature generates: prompts, modes, guidance, adapters."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from miniature.evaluation.cases import SMALL, rendered
from miniature.evaluation.effects import TRIGGERS, adapter_inputs, styled
from miniature.evaluation.painter import ADAPTERS, Painter, data_uri
from miniature.training.world import Object, Scene

logger = logging.getLogger(__name__)

TILE, GAP, HEADING, LABEL = 152, 8, 26, 42  # pixels; LABEL holds three lines
COLUMNS = 8
PAPER, INK, GREY = "#ffffff", "#202020", "#606060"
QUALITY = 82
SEED = 7
SHOWN = {"seed": SEED, "megapixels": "0.25"}

SINGLE = "a red circle on a blue background"
SAMPLES = (
    SINGLE,
    "a yellow star on a purple background",
    "a small green triangle at the top left, white background",
    "a large pink heart on a black background",
    "an orange box on the right on a cyan background",
    "a blue disc next to a red square on a yellow background",
    "a white heart above a black star on a green background",
    "a golden star on a gradient from navy to pink",
)
FEW = SAMPLES[:4]
STYLED = "a yellow circle on a blue background"
SHAPED = (("16:9", "0.25"), ("9:16", "0.25"), ("21:9", "0.25"), ("4:5", "0.25"), ("1:1", "1"))


@dataclass(frozen=True)
class Tile:
    """A picture with its label: generated from inputs, or given."""

    label: str
    inputs: dict[str, Any] | None = None
    given: Image.Image | None = None


def write_gallery(painter: Painter, file: Path) -> None:
    """Draw all tiles and write the sheet as webp."""
    rows = list(_rows())
    asked = [tile.inputs for _, tiles in rows for tile in tiles if tile.inputs]
    images = iter(painter.generate(asked))
    pictures = [
        (title, [(tile.label, tile.given or next(images)) for tile in tiles])
        for title, tiles in rows
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet(pictures).save(file, "WEBP", quality=QUALITY, method=6)
    logger.info("%s: %d kB", file, file.stat().st_size // 1000)


def sheet(rows: list[tuple[str, list[tuple[str, Image.Image]]]]) -> Image.Image:
    """Rows of labelled pictures under headings; each picture fits a square, uncropped."""
    row_height = HEADING + TILE + LABEL + GAP
    size = GAP + COLUMNS * (TILE + GAP), GAP + len(rows) * row_height
    paper = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(paper)
    for number, (title, pictures) in enumerate(rows):
        top = GAP + number * row_height
        pen.text((GAP, top + 4), title, INK, ImageFont.load_default(15))
        for column, (label, picture) in enumerate(pictures):
            left = GAP + column * (TILE + GAP)
            small = picture.convert("RGB")
            small.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
            corner = left + (TILE - small.width) // 2, top + HEADING + (TILE - small.height) // 2
            paper.paste(small, corner)
            font = ImageFont.load_default(11)
            lines = _wrapped(pen, label, font)
            pen.multiline_text((left, top + HEADING + TILE + 2), lines, GREY, font, spacing=2)
    return paper


def _rows() -> Iterator[tuple[str, list[Tile]]]:
    yield "Prompts (dev, 28 steps)", [_tile(prompt, prompt) for prompt in SAMPLES]
    shapes = [
        _tile(f"{ratio}, {size} megapixel", SINGLE, aspect_ratio=ratio, megapixels=size)
        for ratio, size in SHAPED
    ]
    seeds = [_tile(f"seed {seed}", SINGLE, seed=seed) for seed in (1, 2, 3)]
    yield f"Sizes and seeds: “{SINGLE}”", [*shapes, *seeds]
    yield (
        "dev with 28 steps, and schnell with 4",
        [
            _tile(f"{model}: {prompt}", prompt, model=model, num_inference_steps=steps)
            for prompt in FEW
            for model, steps in (("dev", 28), ("schnell", 4))
        ],
    )
    yield (
        "bf16, and float8 with go_fast",
        [
            _tile(f"{name}: {prompt}", prompt, go_fast=fast)
            for prompt in FEW
            for name, fast in (("bf16", False), ("float8", True))
        ],
    )
    yield (
        f"guidance_scale: “{SAMPLES[1]}”",
        [
            _tile(f"{scale}", SAMPLES[1], guidance_scale=scale)
            for scale in (0, 1, 2, 3, 4, 6, 8, 10)
        ],
    )
    yield _image_to_image()
    yield _inpainting()
    for style in TRIGGERS:
        if (ADAPTERS / f"{style}.safetensors").is_file():
            yield _adapter(style)


def _image_to_image() -> tuple[str, list[Tile]]:
    prompt = "a yellow star on a green background"
    picture = rendered(Scene(("blue",), (Object("circle", "red", 0.5, 0.5, 0.3),)), SMALL)
    tiles = [Tile("the image", given=picture)]
    tiles += [
        _tile(f"prompt_strength {share}", prompt, image=data_uri(picture), prompt_strength=share)
        for share in (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0)
    ]
    return f"Image to image: “{prompt}”", tiles


def _inpainting() -> tuple[str, list[Tile]]:
    picture = rendered(Scene(("yellow",), (Object("circle", "blue", 0.26, 0.5, 0.2),)), SMALL)
    mask = Image.new("L", picture.size)
    ImageDraw.Draw(mask).rectangle((260, 130, 500, 382), fill=255)
    tiles = [Tile("the image", given=picture), Tile("the mask", given=mask)]
    for thing in ("red square", "green heart", "black star", "white triangle", "purple circle"):
        prompt = f"a blue circle on the left and a {thing} on the right on a yellow background"
        sent = {"image": data_uri(picture), "mask": data_uri(mask), "prompt_strength": 1.0}
        tiles.append(_tile(f"... and a {thing} on the right ...", prompt, **sent))
    return "Inpainting: “a blue circle on the left and ...”", tiles


def _adapter(style: str) -> tuple[str, list[Tile]]:
    prompt = styled(STYLED, style)
    tiles = [
        _tile(f"lora_scale {scale}", prompt, **adapter_inputs(style), lora_scale=scale)
        for scale in (-1, 0, 0.5, 1, 1.5)
    ]
    fast = {**adapter_inputs(style), "go_fast": True}
    tiles.append(_tile("go_fast, lora_scale 1", prompt, **fast))
    if all((ADAPTERS / f"{name}.safetensors").is_file() for name in TRIGGERS):
        both, two = styled(STYLED, *TRIGGERS), adapter_inputs(*TRIGGERS)
        tiles += [
            _tile("both, outline at 1.5", both, **two, extra_lora_scale=1.5),
            _tile("both at 1, go_fast", both, **two, go_fast=True),
        ]
    return f"Adapter {style}: “{prompt}”", tiles


def _tile(label: str, prompt: str, **inputs: Any) -> Tile:
    return Tile(label, {**SHOWN, "prompt": prompt, **inputs})


def _wrapped(pen: ImageDraw.ImageDraw, text: str, font: Any) -> str:
    """Three lines at most, as wide as a tile."""
    lines, line = [], ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and pen.textlength(longer, font) > TILE:
            lines.append(line)
            line = word
        else:
            line = longer
    return "\n".join([*lines, line][:3])
