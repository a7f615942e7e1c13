"""Miniature repositories laid out like the official ones, and what of them must not be fetched."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    T5EncoderModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from flux.deployment import NANO
from weights import snapshot
from weights.manifest import REPOSITORIES, Repository
from weights.repository import HubSettings, PinnedRepository

TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 224,
    "patch_size": 56,
}
UNWANTED = {
    "dev": ("flux1-dev.safetensors", "ae.safetensors", "README.md", "dev_grid.jpg"),
    "schnell": ("flux1-schnell.safetensors", "vae/config.json", "tokenizer/merges.txt"),
    "safety/compvis": ("pytorch_model.bin", "README.md"),
    "safety/falconsai": ("pytorch_model.bin", "optimizer.pt"),
}

Files = dict[str, bytes]


def build(root: Path) -> dict[str, Files]:
    """The files of each official repository, by their part; FLUX.1 is the embedded miniature."""
    for variant in ("dev", "schnell"):
        shutil.copytree(NANO / variant, root / variant)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        compvis(root / "safety/compvis")
        falconsai(root / "safety/falconsai")
    for variant in ("dev", "schnell"):
        _shard(root / variant / "transformer", FluxTransformer2DModel, "1800KB")
    _shard(root / "dev" / "text_encoder_2", T5EncoderModel, "200KB")
    found = {part: _read(root / part) for part in REPOSITORIES}
    for part, names in UNWANTED.items():
        found[part] |= {name: b"not wanted: " + name.encode() for name in names}
    return found


def compvis(directory: Path) -> None:
    """A checker of the real class, with its weights named as in the official file.

    No concept is near any picture: its own thresholds are out of reach.
    """
    config = CLIPConfig(vision_config=TOWER, projection_dim=8)
    model = StableDiffusionSafetyChecker(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(directory)
    path = directory / "model.safetensors"
    old = {k.replace("vision_model.", "vision_model.vision_model."): v for k, v in _load(path)}
    old["vision_model.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(old, path, {"format": "pt"})
    CLIPImageProcessorPil().save_pretrained(directory)
    _edit(directory / "preprocessor_config.json", image_processor_type="CLIPFeatureExtractor")


def falconsai(directory: Path) -> None:
    """A classifier of the real class that finds every picture normal enough."""
    labels = {0: "normal", 1: "nsfw"}
    config = ViTConfig(**TOWER, id2label=labels, label2id={v: k for k, v in labels.items()})
    model = ViTForImageClassification(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(directory)
    ViTImageProcessorPil().save_pretrained(directory)
    _edit(directory / "preprocessor_config.json", image_processor_type="ViTFeatureExtractor")


def wanted(files: Files, part: str) -> set[str]:
    return set(files) - set(UNWANTED[part])


def obtain(repository: Repository, revision: str, settings: HubSettings) -> Path:
    """Fetch one repository; return the directory of its files."""
    (path,) = snapshot.obtain([PinnedRepository(repository, revision)], settings)
    return path


def _shard(directory: Path, kind: type, size: str) -> None:
    model = kind.from_pretrained(directory, dtype=torch.bfloat16)
    for path in directory.glob("*.safetensors"):
        path.unlink()
    model.save_pretrained(directory, max_shard_size=size)
    assert list(directory.glob("*-00002-of-*.safetensors"))
    assert list(directory.glob("*.safetensors.index.json"))


def _read(directory: Path) -> Files:
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def _load(path: Path) -> list[tuple[str, torch.Tensor]]:
    return list(load_file(path).items())


def _edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
