"""Checkpoints to pipelines: dev and schnell, with one VAE and one pair of text encoders."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FluxPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from flux.attention import set_attention_backend
from flux.memory import bytes_of, device_budget, hold, host_budget
from flux.quantize import quantizes_activations
from flux.residency import that_fit
from flux.transformers import Transformers
from flux.variants import VARIANTS
from weights.checkpoint import directory_of
from weights.redact import without_secrets
from weights.settings import Settings, SettingsError

logger = logging.getLogger(__name__)

NANO = Path(__file__).resolve().parent.parent / "weights" / "nano"
MODULES = ("vae", "text_encoder", "text_encoder_2")
SHARED = (*MODULES, "tokenizer", "tokenizer_2")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be loaded; the message says what to do."""


@dataclass(frozen=True)
class Deployment:
    """Settings after a look at the machine: which checkpoint runs where, and in which dtype."""

    checkpoint: str
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def choose(cls, settings: Settings) -> "Deployment":
        """Replace every `auto`, and say in the log what it became."""
        cuda = torch.cuda.is_available()
        device = _device(_unless_auto(settings.device, "cuda" if cuda else "cpu"))
        checkpoint = _unless_auto(settings.checkpoint, "official" if cuda else "nano")
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

    def source(self, variant: str, settings: Settings) -> Path:
        """The directory that a variant is loaded from; what is not there yet is fetched."""
        if self.checkpoint == "nano":
            return NANO / variant
        directory = directory_of(variant, self.checkpoint, settings)
        if not (directory / "model_index.json").is_file():
            raise CheckpointError(
                f"FLUX_CHECKPOINT={without_secrets(self.checkpoint)}: {directory} holds no "
                "pipeline (model_index.json); expected official, nano, or a directory (or the URL "
                "of a tar) with dev and schnell"
            )
        return directory


def _unless_auto(setting: str, choice: str) -> str:
    return choice if setting == "auto" else setting


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"FLUX_DEVICE={name}: no such device here ({error})") from error
    return device


def load_pipelines(deployment: Deployment, settings: Settings) -> dict[str, FluxPipeline]:
    """Load a text-to-image pipeline for each variant; VAE, text encoders, tokenizers are shared.

    The transformers stay on the host, as diffusers maps them from the file: they are the pristine
    copies that working weights are made from.

    Raises:
        CheckpointError: if files are missing or do not fit together.
        WeightsError: if the checkpoint cannot be fetched.
    """
    sources = {variant: deployment.source(variant, settings) for variant in VARIANTS}
    diffusers_logging.set_verbosity_error()  # prompts.py says it itself where a prompt is cut
    transformers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    pipelines: dict[str, FluxPipeline] = {}
    shared: dict[str, object] = {}
    for variant, source in sources.items():
        start = time.perf_counter()
        try:
            pipeline = FluxPipeline.from_pretrained(source, dtype=deployment.dtype, **shared)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{variant}: cannot load {source}: {error}") from error
        for name in MODULES:
            getattr(pipeline, name).to(deployment.device)
        pipeline.vae.to(memory_format=torch.channels_last)  # a third faster to decode on a CPU
        shared = {name: pipeline.components[name] for name in SHARED}
        pipelines[variant] = pipeline
        logger.info("loaded %s from %s in %.1f s", variant, source, time.perf_counter() - start)
    return pipelines


def working_transformers(
    pipelines: dict[str, FluxPipeline], deployment: Deployment, settings: Settings
) -> Transformers:
    """The transformers that serve, to be made from the pipelines' own.

    Raises:
        BudgetError: the device has no room for any.
        SettingsError: the device lacks what a setting asks for.
    """
    device, masters = deployment.device, {name: p.transformer for name, p in pipelines.items()}
    if device.type == "cuda":  # on a CPU, the copies would lie beside the working weights
        sizes = {name: bytes_of(master) for name, master in masters.items()}
        for name in that_fit(masters, sizes, host_budget(settings.host_memory_bytes)):
            hold(masters[name], page_locked=True)
    shared = next(iter(pipelines.values()))
    loaded = sum(bytes_of(getattr(shared, name)) for name in MODULES)
    budget = device_budget(settings.device_memory_bytes, device, loaded)
    dynamic = quantizes_activations(settings.fp8_activations, device, deployment.dtype)
    transformers = Transformers(masters, device, dynamic=dynamic, budget=budget)
    set_attention_backend(
        transformers.modules.values(), settings.attention_backend, device, deployment.dtype
    )
    return transformers
