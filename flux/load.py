"""Checkpoints to pipelines: dev and schnell, with one VAE and one pair of text encoders."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from flux.components import CheckpointError, load_component, load_module, load_tokenizer
from flux.masters import PART, Master, load_transformer, template
from flux.memory import HostSlabs, bytes_of, device_budget, host_budget
from flux.prequantized import Prequantized, path_of
from flux.quantize import quantizes_activations
from flux.quiet import without_progress_bars
from flux.request import Precision
from flux.transformers import Transformers
from flux.variants import VARIANTS
from weights.checkpoint import directory_of
from weights.inventory import Inventory
from weights.redact import without_secrets
from weights.settings import Settings, SettingsError

logger = logging.getLogger(__name__)

NANO = Path(__file__).resolve().parent.parent / "weights" / "nano"
TOKENIZERS = {"tokenizer": CLIPTokenizer, "tokenizer_2": T5TokenizerFast}
MODULES = {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel, "vae": AutoencoderKL}
PRECISIONS: Mapping[str, Sequence[Precision]] = {
    "all": ("bf16", "fp8"),
    "bf16": ("bf16",),
    "fp8": ("fp8",),
}
"""What FLUX_AT_START names."""


@dataclass(frozen=True)
class Deployment:
    """Settings after a look at the machine: which checkpoint runs where, and in which dtype."""

    checkpoint: str
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def choose(cls, settings: Settings) -> "Deployment":
        """Replace every `auto`, and say in the log what it became."""
        device = _device(_unless_auto(settings.device, "cuda" if _has_cuda() else "cpu"))
        checkpoint = chosen_checkpoint(settings)
        on_cpu = device.type == "cpu"
        dtype = _unless_auto(settings.dtype, "float32" if on_cpu else "bfloat16")
        shown = without_secrets(checkpoint)
        logger.info("checkpoint %s on %s, computing in %s", shown, device, dtype)
        if checkpoint == "nano":
            logger.info(
                "nano is the embedded miniature, for trying out and testing; "
                "set FLUX_CHECKPOINT=official for FLUX.1"
            )
        if on_cpu and dtype == "float32":
            logger.info("bf16 requests compute in float32: most CPUs are far slower in bfloat16")
        return cls(checkpoint, device, getattr(torch, dtype))


def chosen_checkpoint(settings: Settings) -> str:
    """FLUX_CHECKPOINT, with `auto` replaced."""
    return _unless_auto(settings.checkpoint, "official" if _has_cuda() else "nano")


def source_of(variant: str, checkpoint: str, settings: Settings) -> Path:
    """The directory that a variant is loaded from; what is not there yet is fetched.

    Raises:
        CheckpointError: there is no pipeline in it.
        WeightsError: it cannot be fetched.
    """
    if checkpoint == "nano":
        return NANO / variant
    directory = directory_of(variant, checkpoint, settings)
    if not (directory / "model_index.json").is_file():
        raise CheckpointError(
            f"FLUX_CHECKPOINT={without_secrets(checkpoint)}: {directory} holds no pipeline "
            "(model_index.json); expected official, nano, or a directory (or the URL of a tar) "
            "with dev and schnell"
        )
    return directory


def sources_of(checkpoint: str, settings: Settings) -> dict[str, Path]:
    """`source_of` every variant."""
    return {variant: source_of(variant, checkpoint, settings) for variant in VARIANTS}


def _has_cuda() -> bool:
    return torch.cuda.is_available()


def _unless_auto(setting: str, choice: str) -> str:
    return choice if setting == "auto" else setting


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"FLUX_DEVICE={name}: no such device here ({error})") from error
    return device


def load_pipelines(
    sources: Mapping[str, Path], deployment: Deployment, inventory: Inventory
) -> dict[str, FluxPipeline]:
    """Load a text-to-image pipeline for each variant, without a transformer.

    VAE, text encoders and tokenizers are those of the first variant, dev, for both.

    Raises:
        CheckpointError: files are missing or do not fit together.
    """
    without_progress_bars()
    variant, source = next(iter(sources.items()))
    shared: dict[str, Any] = {}
    for name, kind in TOKENIZERS.items():
        with inventory.loading(name, source / name):
            shared[name] = load_tokenizer(f"{variant} {name}", kind, source / name)
    for name, kind in MODULES.items():
        with inventory.loading(name, source / name) as tensors:
            module = load_module(f"{variant} {name}", kind, source / name, deployment.dtype)
            shared[name] = module.to(deployment.device)
            tensors.extend(module.parameters())
    shared["vae"].to(memory_format=torch.channels_last)  # a third faster to decode on a CPU
    pipelines = {}
    for variant, source in sources.items():
        scheduler = load_component(
            f"{variant} scheduler", FlowMatchEulerDiscreteScheduler, source / "scheduler"
        )
        pipelines[variant] = FluxPipeline(scheduler=scheduler, transformer=None, **shared)
    return pipelines


def working_transformers(
    pipelines: Mapping[str, FluxPipeline],
    sources: Mapping[str, Path],
    deployment: Deployment,
    settings: Settings,
) -> Transformers:
    """The transformers that serve, made from the checkpoint's own; see `flux.transformers`.

    Raises:
        CheckpointError: a transformer, or its float8 weights, cannot be loaded.
        BudgetError: the device has no room for any.
    """
    device = deployment.device
    shared = next(iter(pipelines.values()))
    loaded = sum(bytes_of(getattr(shared, name)) for name in MODULES)
    return Transformers(
        _masters(sources, deployment, settings),
        device,
        dynamic=quantizes_activations(settings.fp8_activations, device, deployment.dtype),
        budget=device_budget(settings.device_memory_bytes, device, loaded),
        precisions=PRECISIONS[settings.at_start],
    )


def _masters(
    sources: Mapping[str, Path], deployment: Deployment, settings: Settings
) -> dict[str, Master]:
    """The pristine transformers, open but for those whose float8 weights are on disk."""
    slabs = None
    if deployment.device.type == "cuda":  # on a CPU, copies would lie beside the working weights
        slabs = HostSlabs(host_budget(settings.host_memory_bytes))
    masters = {}
    for variant, source in sources.items():
        directory = source / PART
        model, prequantized = template(variant, directory, deployment.dtype), None
        if settings.quantized_directory:
            path = path_of(variant, settings.quantized_directory)
            prequantized = Prequantized(path, model, directory)
        load = partial(_open, variant, directory, deployment.dtype, slabs)
        masters[variant] = Master(variant, model, load, directory, prequantized)
        if not prequantized:
            masters[variant].open()
    return masters


def _open(variant: str, directory: Path, dtype: torch.dtype, slabs: HostSlabs | None) -> nn.Module:
    """A pristine transformer, in page-locked memory if there are slabs with room for it."""
    transformer = load_transformer(variant, directory, dtype)
    if slabs:
        slabs.hold(transformer)
    return transformer
