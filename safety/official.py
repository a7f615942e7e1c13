"""The two checkers that the official deployment uses, each through its library's own class.

Both preprocess with transformers' own processors (those on PIL: torchvision is not needed). With
CUDA the networks compute in float16: CompVis' file holds float16, which bfloat16 would round, and
scores are close to their limits. Scores and limits are compared in float32.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors import SafetensorError
from torch import nn
from transformers import CLIPImageProcessorPil, ViTForImageClassification, ViTImageProcessorPil

from safety.checker import CheckerError, Verdict
from weights.serving.quiet import without_progress_bars

SPECIAL_CARE = 0.01  # what the class adds to every concept once a special one is seen
DIGITS = 3  # to which the class rounds before it compares with zero
UNSAFE_LABEL = "nsfw"
COMPVIS_THRESHOLD = 0.0  # a concept that scores more is flagged, as in the class itself
FALCONSAI_THRESHOLD = 0.5  # the probability of "nsfw" from which an image is flagged
DTYPES = {"cuda": torch.float16}  # of the networks by kind of device; else float32


class CompVis:
    """CompVis' checker: CLIP's view of an image against 17 concepts, each with its threshold.

    diffusers' class blacks flagged images out in its forward, so this asks its modules instead.
    """

    def __init__(self, directory: Path, device: torch.device) -> None:
        self._processor = _load_processor(CLIPImageProcessorPil, directory)
        self._model = _load(StableDiffusionSafetyChecker, directory).to(device)
        for network in (self._model.vision_model, self._model.visual_projection):
            network.to(_dtype(device))

    def parameters(self) -> Iterator[torch.Tensor]:
        """What is on the device for it."""
        return self._model.parameters()  # type: ignore[no-any-return]

    @torch.no_grad()
    def check(self, image: Image.Image) -> Verdict:
        """Judge an RGB image of any size by its worst concept, -2 to 2; 0 is the class's limit."""
        model = self._model
        pixels = _pixels(self._processor, image).to(model.vision_model.device)
        pooled = model.vision_model(pixels.to(model.vision_model.dtype)).pooler_output
        embedding = nn.functional.normalize(model.visual_projection(pooled).float())
        special = _similarity(embedding, model.special_care_embeds)
        special -= model.special_care_embeds_weights
        concepts = _similarity(embedding, model.concept_embeds) - model.concept_embeds_weights
        care = SPECIAL_CARE if round(float(special.max()), DIGITS) > 0 else 0.0
        score = round(float(concepts.max()) + care, DIGITS)
        return Verdict(flagged=not score <= COMPVIS_THRESHOLD, scores={"compvis": score})


class Falconsai:
    """Falconsai's ViT, which tells "normal" from "nsfw"."""

    def __init__(self, directory: Path, device: torch.device) -> None:
        self._processor = _load_processor(ViTImageProcessorPil, directory)
        self._model = _load(ViTForImageClassification, directory).to(device, _dtype(device))
        labels = {str(label).lower(): i for i, label in self._model.config.id2label.items()}
        if UNSAFE_LABEL not in labels:
            raise CheckerError(f"{directory}: no label {UNSAFE_LABEL} among {', '.join(labels)}")
        self._unsafe = int(labels[UNSAFE_LABEL])

    def parameters(self) -> Iterator[torch.Tensor]:
        """What is on the device for it."""
        return self._model.parameters()  # type: ignore[no-any-return]

    @torch.no_grad()
    def check(self, image: Image.Image) -> Verdict:
        """Judge an RGB image of any size by its probability of being unsafe, 0 to 1."""
        pixels = _pixels(self._processor, image).to(self._model.device, self._model.dtype)
        logits = self._model(pixels).logits.float()
        score = float(logits.softmax(-1)[0, self._unsafe])
        return Verdict(flagged=not score < FALCONSAI_THRESHOLD, scores={"falconsai": score})


def _dtype(device: torch.device) -> torch.dtype:
    return DTYPES.get(device.type, torch.float32)


def _load(kind: type[Any], directory: Path) -> Any:  # noqa: ANN401
    """Load a transformers model; unlike from_pretrained, a missing weight is an error."""
    without_progress_bars()
    try:
        model, found = kind.from_pretrained(
            directory, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckerError(f"cannot load the checker in {directory}: {error}") from error
    wrong = [str(key) for kinds in found.values() for key in kinds]
    if wrong:
        raise CheckerError(
            f"cannot load the checker in {directory}: its weights do not fit {kind.__name__} "
            f"({', '.join(sorted(wrong)[:3])}, ...)"
        )
    return model.eval()


def _load_processor(kind: type[Any], directory: Path) -> Any:  # noqa: ANN401
    try:
        return kind.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise CheckerError(
            f"cannot load the checker in {directory}: "
            "preprocessor_config.json is missing or damaged"
        ) from error


def _pixels(processor: Any, image: Image.Image) -> torch.Tensor:  # noqa: ANN401
    pixels: torch.Tensor = processor(images=image, return_tensors="pt").pixel_values
    return pixels


def _similarity(embedding: torch.Tensor, concepts: torch.Tensor) -> torch.Tensor:
    """Cosine of an embedding (1, d) of length 1 with concepts (n, d): (n,)."""
    return (embedding @ nn.functional.normalize(concepts.float()).T)[0]
