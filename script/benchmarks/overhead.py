"""A whole request against diffusers' own pipeline: dev, 28 steps, 512 x 512, on the miniature.

Both start from a prompt that has not been seen. diffusers' pipeline ends with a Pillow image;
a request ends with a webp file of an image that the safety checker has passed.
"""

import inspect
import itertools
import logging
import os
from collections.abc import Callable

import torch
from diffusers import FluxPipeline

from benchmarks.shared.report import interleave, medians, parser, report
from flux.deployment import NANO
from predict import Predictor

ROUNDS = 21
STEPS = 28


def main() -> None:
    file = parser().parse_args().json
    os.environ |= {"FLUX_CHECKPOINT": "nano", "FLUX_DEVICE": "cpu"}
    predictor = Predictor()
    predictor.setup()
    logging.disable(logging.INFO)
    seconds = interleave(contenders(predictor), ROUNDS)
    median = medians(seconds)
    base = median["diffusers"]
    report(
        "overhead",
        {
            "rounds": ROUNDS,
            "median_seconds": {name: round(value, 4) for name, value in median.items()},
            "ratio_to_diffusers": {name: round(value / base, 3) for name, value in median.items()},
        },
        file,
    )


def contenders(predictor: Predictor) -> dict[str, Callable[[], None]]:
    pipeline = FluxPipeline.from_pretrained(NANO / "dev", dtype=torch.float32)
    pipeline.set_progress_bar_config(mininterval=0)
    signature = inspect.signature(predictor.run).parameters
    defaults = {name: parameter.default.default for name, parameter in signature.items()}
    number = itertools.count()

    def request(**inputs: object) -> None:
        prompt = f"a red circle on a blue background {next(number)}"
        predictor.run(**{**defaults, "prompt": prompt, "megapixels": "0.25", **inputs})

    def diffusers() -> None:
        pipeline(
            f"a red circle on a blue background {next(number)}",
            width=512,
            height=512,
            num_inference_steps=STEPS,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(0),
        )

    return {
        "diffusers": diffusers,
        "request": request,
        "request without checker": lambda: request(disable_safety_checker=True),
    }


if __name__ == "__main__":
    main()
