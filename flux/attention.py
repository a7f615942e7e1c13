"""Which implementation of attention the transformers use: diffusers' backends, by name."""

import logging
from collections.abc import Collection
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import nn

from weights.settings import SettingsError

logger = logging.getLogger(__name__)

NATIVE = AttentionBackendName.NATIVE.value  # PyTorch's own choice among its kernels
PROBE_TOKENS = 128


def set_attention_backend(
    transformers: Collection[nn.Module], choice: str, device: torch.device, dtype: torch.dtype
) -> None:
    """Have transformers attend with a backend, once it has been tried on the device.

    Args:
        transformers: of one head count and width.
        choice: a name of diffusers' AttentionBackendName, or `auto`, which is `native`.
        device: where they compute.
        dtype: of their activations.

    Raises:
        SettingsError: no such backend, or this device or environment lacks it.
    """
    backend = NATIVE if choice == "auto" else choice
    names = [name.value for name in AttentionBackendName]
    if backend not in names:
        raise SettingsError(
            f"FLUX_ATTENTION_BACKEND={choice}: no such backend; expected auto or one of "
            f"{', '.join(names)}"
        )
    try:
        for transformer in transformers:
            transformer.set_attention_backend(backend)  # type: ignore[operator]
        config: Any = next(iter(transformers)).config
        shape = (1, PROBE_TOKENS, config.num_attention_heads, config.attention_head_dim)
        probe = torch.ones(shape, device=device, dtype=dtype)
        dispatch_attention_fn(probe, probe, probe, backend=AttentionBackendName(backend))
    except Exception as error:  # of every package and kernel that a backend is made of
        for transformer in transformers:
            transformer.set_attention_backend(NATIVE)  # type: ignore[operator]
        raise SettingsError(
            f"FLUX_ATTENTION_BACKEND={choice}: cannot be used here, on {device} in {dtype}: "
            f"{str(error).rstrip('.')}. Install what it asks for, or set {NATIVE}"
        ) from error
    logger.info("attention: %s", backend)
