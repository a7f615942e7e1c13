"""Checkpoints to pipelines: dev and schnell, with one VAE and one pair of text encoders."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FluxPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from torch import nn
from transformers.utils import logging as transformers_logging

from flux.memory import bytes_of, device_budget, host_budget
from flux.offload import OnHost, offload, offloaded
from flux.quantize import quantizes_activations
from flux.residency import BudgetError, that_fit
from flux.slabs import hold
from flux.transformers import COMPONENT, Transformers
from flux.variants import VARIANTS
from weights.checkpoint import directory_of, fetch_missing
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
    """Settings after a look at the machine: which checkpoint runs where, and in which dtype.

    Attributes:
        offloaded: components that live on the host, and visit the device layer by layer.
    """

    checkpoint: str
    device: torch.device
    dtype: torch.dtype
    offloaded: frozenset[str] = frozenset()

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
        on_host = offloaded(settings.offload, device)
        if on_host:
            logger.info("%s: on the host, brought layer by layer", " and ".join(sorted(on_host)))
        return cls(checkpoint, device, getattr(torch, dtype), on_host)

    def fetch(self, checkers: Sequence[str], settings: Settings) -> None:
        """Fetch what is not there yet of all that this start needs, if the disk has room for it.

        checkers: parts of weights/manifest.py besides the variants.
        """
        variants = () if self.checkpoint == "nano" else VARIANTS
        fetch_missing([*checkers, *variants], self.checkpoint, settings)

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
        BudgetError: if there is no room for what is offloaded.
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
        for name in [name for name in MODULES if name not in shared]:
            _place(name, getattr(pipeline, name), deployment)
        pipeline.vae.to(memory_format=torch.channels_last)  # a third faster to decode on a CPU
        shared = {name: pipeline.components[name] for name in SHARED}
        pipelines[variant] = pipeline
        logger.info("loaded %s from %s in %.1f s", variant, source, time.perf_counter() - start)
    return pipelines


def _place(name: str, module: nn.Module, deployment: Deployment) -> None:
    """Have a component run on the device, with its weights there or, if offloaded, on the host."""
    if name not in deployment.offloaded:
        module.to(deployment.device)
        return
    if deployment.device.type == "cuda" and not hold(module, page_locked=True):
        raise BudgetError(f"FLUX_OFFLOAD: {name} needs page-locked host memory; see the log")
    offload(module, deployment.device)


def working_transformers(
    pipelines: dict[str, FluxPipeline], deployment: Deployment, settings: Settings
) -> Transformers:
    """The transformers that serve, to be made from the pipelines' own.

    Raises:
        BudgetError: there is no room for any.
    """
    device, masters = deployment.device, {name: p.transformer for name, p in pipelines.items()}
    shared = next(iter(pipelines.values()))
    taken = {name: bytes_of(getattr(shared, name)) for name in MODULES}
    on_host = sum(taken[name] for name in MODULES if name in deployment.offloaded)
    budget = device_budget(settings.device_memory_bytes, device, sum(taken.values()) - on_host)
    home = OnHost(device) if COMPONENT in deployment.offloaded else None
    if device.type == "cuda":  # a CPU has one memory, where copies would lie beside the map
        left = host_budget(settings.host_memory_bytes) - on_host
        if home:  # the working weights take it, and the pristine ones stay in the map
            budget = left
        else:
            sizes = {name: bytes_of(master) for name, master in masters.items()}
            for name in that_fit(masters, sizes, left):
                hold(masters[name], page_locked=True)
    dynamic = quantizes_activations(settings.fp8_activations, device, deployment.dtype)
    return Transformers(masters, device, dynamic=dynamic, budget=budget, home=home)
