"""Inputs to Request: every rule that a caller can observe, resolved once.

Sizes, modes, steps, seeds and precision are decided here and nowhere else; later stages follow the
frozen Request. This module does not import torch.
"""

import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from os import PathLike
from typing import TypeVar

from PIL import Image

from flux.images import ImageError, read_image, read_mask, resize
from flux.sampling import ASPECT_RATIOS, MEGAPIXEL, fit_size, nearest_multiple, sigmas
from flux.variants import VARIANTS, Key, Precision, Variant
from weights.serving.settings import Settings

logger = logging.getLogger(__name__)

T = TypeVar("T")
SEED_RANGE = 2**64  # what torch.Generator takes; seeds wrap around
GO_FAST_MULTIPLIER = 1.5  # of both scales: the contract says so


class RequestError(ValueError):
    """An input, or a combination of inputs, that cannot be served; the message says why."""


@dataclass(frozen=True)
class Inputs:
    """The inputs of the public contract, named, typed and ordered as there."""

    prompt: str
    image: PathLike[str] | str | None = None
    mask: PathLike[str] | str | None = None
    aspect_ratio: str = "1:1"
    height: int | None = None
    width: int | None = None
    prompt_strength: float = 0.8
    model: str = "dev"
    num_outputs: int = 1
    num_inference_steps: int = 28
    guidance_scale: float = 3
    seed: int | None = None
    output_format: str = "webp"
    output_quality: int = 80
    disable_safety_checker: bool = False
    go_fast: bool = False
    megapixels: str = "1"
    replicate_weights: str | None = None
    lora_scale: float = 1
    extra_lora: str | None = None
    extra_lora_scale: float = 1


class Mode(Enum):
    """What is generated: a new image, a variation of one, or a part of one."""

    TEXT_TO_IMAGE = "txt2img"
    IMAGE_TO_IMAGE = "img2img"
    INPAINT = "inpaint"


@dataclass(frozen=True)
class Request:
    """A resolved request.

    Attributes:
        width, height: of the output, in pixels; multiples of 16.
        image: RGB, of the output's size; None in txt2img.
        mask: mode L, of the output's size, white where the image is repainted; inpaint only.
        sigmas: noise levels before the variant's shift, one for each step; empty at strength 0,
            where the output is the input image.
        seeds: one for each image, 0 to 2**64 - 1.
        guidance: for the guidance embedding; None for a variant that has none.
        adapters: references, as the caller wrote them, with their effective scales.
    """

    prompt: str
    variant: Variant
    mode: Mode
    precision: Precision
    width: int
    height: int
    image: Image.Image | None
    mask: Image.Image | None
    sigmas: tuple[float, ...]
    seeds: tuple[int, ...]
    guidance: float | None
    adapters: tuple[tuple[str, float], ...]
    output_format: str
    output_quality: int
    check_safety: bool

    @property
    def key(self) -> Key:
        """The transformer that generates it."""
        return Key(self.variant.name, self.precision)


def make_request(inputs: Inputs, settings: Settings, default_adapter: str | None = None) -> Request:
    """Apply the contract's rules.

    Args:
        inputs: as they come from the server.
        settings: the operator's limits and permissions.
        default_adapter: a reference that stands in for an empty `replicate_weights`.

    Raises:
        RequestError: for inputs that cannot be served.
    """
    variant = _row(VARIANTS, "model", inputs.model)
    mode = _mode(inputs)
    limit = settings.max_input_megapixels * MEGAPIXEL
    try:
        image = None if inputs.image is None else read_image(inputs.image, limit)
        mask = None if inputs.mask is None else read_mask(inputs.mask, limit)
    except ImageError as error:
        raise RequestError(str(error)) from error
    width, height = _size(inputs, image)
    precision = _precision(inputs, image)
    first_seed = _seed(inputs.seed)
    logger.info("Using seed: %d", first_seed)
    _log_ignored(inputs, variant, default_adapter)
    return Request(
        prompt=inputs.prompt,
        variant=variant,
        mode=mode,
        precision=precision,
        width=width,
        height=height,
        image=image and resize(image, width, height),
        mask=mask and resize(mask, width, height),
        sigmas=_noise_levels(inputs, mode, mask),
        seeds=tuple((first_seed + k) % SEED_RANGE for k in range(int(inputs.num_outputs))),
        guidance=float(inputs.guidance_scale) if variant.guidance else None,
        adapters=_adapters(inputs, default_adapter, scale_multiplier(precision)),
        output_format=inputs.output_format,
        output_quality=int(inputs.output_quality),
        check_safety=_check_safety(inputs, settings.allow_disable_safety_checker),
    )


def scale_multiplier(precision: Precision) -> float:
    """What the scales of adapters are multiplied by, as the contract says."""
    return GO_FAST_MULTIPLIER if precision == "fp8" else 1.0


def _mode(inputs: Inputs) -> Mode:
    if inputs.image is not None:
        return Mode.IMAGE_TO_IMAGE if inputs.mask is None else Mode.INPAINT
    if inputs.mask is not None:
        raise RequestError(
            "mask: given without image. A mask says which part of an input image to repaint; "
            "send the image too, or leave out the mask."
        )
    return Mode.TEXT_TO_IMAGE


def _size(inputs: Inputs, image: Image.Image | None) -> tuple[int, int]:
    """The output's width and height in pixels; logs each input that has no effect on them."""
    quarter = inputs.megapixels == "0.25"
    custom = inputs.aspect_ratio == "custom"
    if image is not None:
        if inputs.aspect_ratio != "1:1" or inputs.width or inputs.height:
            logger.info("aspect_ratio, width and height are ignored: the image sets the size")
        size = fit_size(*image.size, quarter=quarter)
        if size == fit_size(*image.size, quarter=not quarter):
            logger.info("megapixels has no effect: the image is small enough for either")
        elif not quarter and size[0] * size[1] > 1.1 * MEGAPIXEL:
            logger.info("megapixels is exceeded: the image sets the size, %d x %d", *size)
        return size
    if custom:
        if not (inputs.width and inputs.height):
            raise RequestError(
                "aspect_ratio: custom needs both width and height, "
                f"got width={inputs.width}, height={inputs.height}"
            )
        if quarter:
            logger.info("megapixels is ignored: custom takes the size from width and height")
        return nearest_multiple(inputs.width), nearest_multiple(inputs.height)
    if inputs.width or inputs.height:
        logger.info("width and height are ignored: they only work with aspect_ratio custom")
    width, height = _row(ASPECT_RATIOS, "aspect_ratio", inputs.aspect_ratio)
    return (width // 2, height // 2) if quarter else (width, height)


def _precision(inputs: Inputs, image: Image.Image | None) -> Precision:
    """fp8 for go_fast, unless a custom size is generated, which the contract runs in bf16."""
    if inputs.go_fast and inputs.aspect_ratio == "custom" and image is None:
        logger.info("go_fast is ignored: custom sizes run in bf16")
        return "bf16"
    return "fp8" if inputs.go_fast else "bf16"


def _noise_levels(inputs: Inputs, mode: Mode, mask: Image.Image | None) -> tuple[float, ...]:
    """Empty at strength 0, and with a black mask, where the output is the input image."""
    if mask and not mask.getbbox():
        logger.info("The mask is black everywhere: nothing is repainted")
        return ()
    strength = 1.0 if mode is Mode.TEXT_TO_IMAGE else float(inputs.prompt_strength)
    if strength == 0:
        logger.info("prompt_strength 0 keeps the image as it is: nothing is generated")
        return ()
    return tuple(sigmas(int(inputs.num_inference_steps), strength))


def _log_ignored(inputs: Inputs, variant: Variant, default_adapter: str | None) -> None:
    """Say in the log which inputs have no effect, besides those that would set the size."""
    if not variant.guidance:
        logger.info("guidance_scale is ignored: %s has no guidance embedding", variant.name)
    main, extra = _references(inputs, default_adapter)
    for name, reason in (
        ("prompt_strength", "" if inputs.image is not None else "there is no image"),
        ("output_quality", "png keeps every pixel" if inputs.output_format == "png" else ""),
        ("lora_scale", "" if main else "there is no replicate_weights"),
        ("extra_lora_scale", "" if extra else "there is no extra_lora"),
    ):
        if reason and getattr(inputs, name) != getattr(Inputs, name):
            logger.info("%s is ignored: %s", name, reason)


def _adapters(
    inputs: Inputs, default: str | None, multiplier: float
) -> tuple[tuple[str, float], ...]:
    """Main and extra adapter with their scales."""
    scales = (inputs.lora_scale, inputs.extra_lora_scale)
    given = zip(_references(inputs, default), scales, strict=True)
    return tuple((reference, scale * multiplier) for reference, scale in given if reference)


def _references(inputs: Inputs, default: str | None) -> tuple[str, str]:
    """The main and the extra adapter's; blank ones are none."""
    main = (inputs.replicate_weights or "").strip() or default or ""
    return main, (inputs.extra_lora or "").strip()


def _seed(seed: int | None) -> int:
    """The given seed, 0 included; 32 random bits for none or a negative one."""
    if seed is None or seed < 0:
        return secrets.randbits(32)
    if seed >= SEED_RANGE:
        logger.info("The seed is taken modulo 2**64")
    return int(seed) % SEED_RANGE


def _check_safety(inputs: Inputs, may_skip_safety: bool) -> bool:
    if inputs.disable_safety_checker and not may_skip_safety:
        logger.info("disable_safety_checker is ignored: this deployment does not allow it")
        return True
    return not inputs.disable_safety_checker


def _row(table: Mapping[str, T], name: str, value: str) -> T:
    """The row of a table that an input names; checked here too, for use without a schema."""
    if value not in table:
        raise RequestError(f"{name}: {value!r} is not one of {', '.join(table)}")
    return table[value]
