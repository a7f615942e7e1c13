"""Weights planted into the miniature checkers, so that they flag chosen pictures."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil, ViTForImageClassification, ViTImageProcessorPil

from tests.support.official import Files


def plant_flags(
    root: Path,
    files: Mapping[str, Files],
    pictures: Sequence[Image.Image],
    compvis: Collection[int],
    falconsai: Collection[int],
) -> None:
    """Write `root/safety`, whose checkers flag these pictures (by index) and none of the others."""
    first = write(root / "safety/compvis", files["safety/compvis"])
    views = torch.stack([embedding(first, picture) for picture in pictures])
    concepts = torch.eye(17, 8)
    thresholds = torch.full((17,), 2.0)
    for index in compvis:
        others = [float(views[index] @ v) for i, v in enumerate(views) if i != index]
        concepts[index], thresholds[index] = views[index], (1 + max(others)) / 2
    plant(first, concept_embeds=concepts, concept_embeds_weights=thresholds)
    plant(first, special_care_embeds_weights=torch.full((3,), 2.0))
    second = write(root / "safety/falconsai", files["safety/falconsai"])
    plant(second, **{"classifier.weight": torch.zeros(2, 16), "classifier.bias": torch.zeros(2)})
    model = ViTForImageClassification.from_pretrained(second)
    processor = ViTImageProcessorPil.from_pretrained(second)
    with torch.no_grad():
        pixels = processor(images=pictures, return_tensors="pt").pixel_values
        states = model.vit(pixels).last_hidden_state[:, 0]
    wanted = [3.0 if i in falconsai else -3.0 for i in range(len(pictures))]
    row = torch.linalg.lstsq(states, torch.tensor(wanted)[:, None]).solution[:, 0]
    plant(second, **{"classifier.weight": torch.stack([torch.zeros(16), row])})


def write(directory: Path, files: dict[str, bytes]) -> Path:
    directory.mkdir(parents=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory


def plant(directory: Path, **tensors: torch.Tensor) -> None:
    path = directory / "model.safetensors"
    save_file(load_file(path) | tensors, path, {"format": "pt"})


def compvis_model(directory: Path) -> StableDiffusionSafetyChecker:
    return StableDiffusionSafetyChecker.from_pretrained(directory)


def clip_input(directory: Path, image: Image.Image) -> torch.Tensor:
    processor = CLIPImageProcessorPil.from_pretrained(directory)
    return processor(images=[image], return_tensors="pt").pixel_values


@torch.no_grad()
def embedding(directory: Path, image: Image.Image) -> torch.Tensor:
    model = compvis_model(directory)
    found = model.visual_projection(model.vision_model(clip_input(directory, image))[1])
    return torch.nn.functional.normalize(found)[0]
