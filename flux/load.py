"""Checkpoints to an engine: dev and schnell, with one VAE and one pair of text encoders."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from flux.autoencoder import memory_format
from flux.components import (
    TRANSFORMER,
    load_component,
    load_module,
    load_skeleton,
    load_tokenizer,
    load_transformer,
)
from flux.deployment import Deployment, sources_of
from flux.engine import Engine
from flux.memory.budget import bytes_of, device_budget, host_budget
from flux.memory.offload import OnHost, offload
from flux.memory.pinned import PinnedBudget, move_parameters
from flux.memory.residency import BudgetError
from flux.memory.staging import move
from flux.transformers.attention import attend, build_plans, needs_plans, set_attention_backend
from flux.transformers.base_weights import BaseWeights
from flux.transformers.compile import compile_blocks
from flux.transformers.float8 import quantizes_activations
from flux.transformers.one_pass import one_pass
from flux.transformers.pool import Transformers
from flux.transformers.prequantized import Prequantized, path_of
from flux.variants import Precision
from weights.serving.inventory import Inventory
from weights.serving.quiet import without_progress_bars
from weights.serving.settings import AtStart, Settings

TOKENIZERS = {"tokenizer": CLIPTokenizer, "tokenizer_2": T5TokenizerFast}
MODULES = {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel, "vae": AutoencoderKL}
PRECISIONS: Mapping[AtStart, Sequence[Precision]] = {
    "all": ("bf16", "fp8"),
    "bf16": ("bf16",),
    "fp8": ("fp8",),
}
"""What FLUX_AT_START names."""


def load_engine(deployment: Deployment, settings: Settings, inventory: Inventory) -> Engine:
    """Load what generates images, from files that are there.

    Raises:
        CheckpointError: files are missing or do not fit together.
        BudgetError: there is no room for what must be there.
        SettingsError: the device lacks what a setting asks for.
    """
    sources = sources_of(deployment.checkpoint, settings)
    pipelines = load_pipelines(sources, deployment, inventory)
    transformers = working_transformers(pipelines, sources, deployment, settings)
    compilation = compile_blocks(transformers.modules, deployment, settings)
    return Engine(pipelines, transformers, compilation)


def load_pipelines(
    sources: Mapping[str, Path], deployment: Deployment, inventory: Inventory
) -> dict[str, FluxPipeline]:
    """Load a text-to-image pipeline for each variant, without a transformer.

    VAE, text encoders and tokenizers are those of the first variant, dev, for both.

    Raises:
        CheckpointError: files are missing or do not fit together.
        BudgetError: there is no room for what is offloaded.
    """
    without_progress_bars()
    variant, source = next(iter(sources.items()))
    shared: dict[str, Any] = {}
    for name, kind in TOKENIZERS.items():
        with inventory.loading(name, source / name):
            shared[name] = load_tokenizer(f"{variant} {name}", kind, source / name)
    for name, kind in MODULES.items():
        with inventory.loading(name, source / name) as tensors:
            shared[name] = load_module(f"{variant} {name}", kind, source / name, deployment.dtype)
            _place(name, shared[name], deployment)
            tensors.extend(shared[name].parameters())
    shared["vae"].to(memory_format=memory_format(deployment.device))
    pipelines = {}
    for variant, source in sources.items():
        scheduler = load_component(
            f"{variant} scheduler", FlowMatchEulerDiscreteScheduler, source / "scheduler"
        )
        pipelines[variant] = FluxPipeline(scheduler=scheduler, transformer=None, **shared)
    return pipelines


def _place(name: str, module: nn.Module, deployment: Deployment) -> None:
    """Have a component run on the device, with its weights there or, if offloaded, on the host."""
    if name not in deployment.offloaded:
        move(module, deployment.device)
        return
    if deployment.device.type == "cuda" and not move_parameters(module, pinned=True):
        raise BudgetError(f"FLUX_OFFLOAD: {name} needs page-locked host memory; see the log")
    offload(module, deployment.device)


def working_transformers(
    pipelines: Mapping[str, FluxPipeline],
    sources: Mapping[str, Path],
    deployment: Deployment,
    settings: Settings,
) -> Transformers:
    """The transformers that serve, made from the checkpoint's own; see `flux.transformers.pool`.

    Raises:
        CheckpointError: a transformer, or its float8 weights, cannot be loaded.
        BudgetError: there is no room for any.
        SettingsError: the device lacks what a setting asks for.
    """
    device, shared = deployment.device, next(iter(pipelines.values()))
    taken = {name: bytes_of(getattr(shared, name)) for name in MODULES}
    on_host = sum(taken[name] for name in MODULES if name in deployment.offloaded)
    budget = device_budget(settings.device_memory_bytes, device, sum(taken.values()) - on_host)
    placement = OnHost(device) if TRANSFORMER in deployment.offloaded else None
    adapters = None if placement else one_pass(device, settings.lora_device_bytes)
    if adapters and budget is not None:
        budget = max(0, budget - settings.lora_device_bytes)
    pinned_budget = None
    if device.type == "cuda":  # a CPU has one memory, where copies would lie beside the map
        left = host_budget(settings.host_memory_bytes) - on_host
        if placement:  # the working weights take it, and the base ones stay in the map
            budget = left
        else:
            pinned_budget = PinnedBudget(left)
    transformers = Transformers(
        _base_weights(sources, deployment.dtype, settings.quantized_directory, pinned_budget),
        device,
        dynamic=quantizes_activations(settings.fp8_activations, device, deployment.dtype),
        budget=budget,
        placement=placement,
        precisions=PRECISIONS[settings.at_start],
        one_pass=adapters,
    )
    modules = list(transformers.modules.values())
    backend = set_attention_backend(modules, settings.attention_backend, device, deployment.dtype)
    if needs_plans(backend, device):
        over = partial(attend, modules[0], backend, device=device, dtype=deployment.dtype)
        build_plans(over, 2 * shared.vae_scale_factor)
    return transformers


def _base_weights(
    sources: Mapping[str, Path],
    dtype: torch.dtype,
    quantized: Path | None,
    pinned_budget: PinnedBudget | None,
) -> dict[str, BaseWeights]:
    """The base transformers, open but for those whose float8 weights are on disk."""
    base_weights = {}
    for variant, source in sources.items():
        directory = source / TRANSFORMER
        model, prequantized = load_skeleton(variant, directory, dtype), None
        if quantized:
            prequantized = Prequantized(path_of(variant, quantized), model, directory)
        load = partial(load_transformer, variant, directory, dtype)
        base_weights[variant] = BaseWeights(
            *(variant, model, load, directory, prequantized),
            pin=pinned_budget.pin if pinned_budget else None,
        )
        if not prequantized:
            base_weights[variant].open()
    return base_weights
