"""Which implementation of attention the transformers use: diffusers' backends, by name.

On cards of capability 9.0 and 10.0 PyTorch prefers cuDNN's (sdp_utils.cpp,
`check_prefer_cudnn_attention`), which builds a plan for each number of tokens and each layout, and
keeps it for the thread that asked (cudnn/MHA.cpp, `MHAParams`). Others saw 0.02 to 0.44 s a plan
(https://github.com/modelscope/FunASR/issues/3704, on a B200), which the first image of each size
would wait for. So the engine thread attends in each of the contract's sizes in setup, as a double
block does and as a single block does.
"""

import logging
import time
from collections.abc import Callable, Collection
from functools import partial
from math import prod
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import nn

from flux.sampling import ASPECT_RATIOS
from flux.variants import VARIANTS
from weights.serving.settings import SettingsError

logger = logging.getLogger(__name__)

NATIVE = AttentionBackendName.NATIVE.value  # PyTorch's own choice among its kernels
PROBE_TOKENS = 128
BUILDS_PLANS = {NATIVE, AttentionBackendName._NATIVE_CUDNN.value}  # or may, on such a card
CAPABILITY = 9  # that PyTorch prefers cuDNN from
LIMIT = 20.0  # seconds of setup for plans


def set_attention_backend(
    transformers: Collection[nn.Module], choice: str, device: torch.device, dtype: torch.dtype
) -> AttentionBackendName:
    """Have transformers attend with a backend, once it has been tried on the device.

    Args:
        transformers: of one head count and width.
        choice: a name of diffusers' AttentionBackendName, or `auto`, which is `native`.
        device: where they compute.
        dtype: of their activations.

    Returns:
        the backend.

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
        found = AttentionBackendName(backend)
        attend(next(iter(transformers)), found, PROBE_TOKENS, device, dtype)
    except Exception as error:  # of every package and kernel that a backend is made of
        for transformer in transformers:
            transformer.set_attention_backend(NATIVE)  # type: ignore[operator]
        raise SettingsError(
            f"FLUX_ATTENTION_BACKEND={choice}: cannot be used here, on {device} in {dtype}: "
            f"{str(error).rstrip('.')}; install what it asks for, or set {NATIVE}"
        ) from error
    logger.info("attention: %s", backend)
    return found


def attend(
    transformer: nn.Module,
    backend: AttentionBackendName,
    tokens: int,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Attend once as each kind of block does, over text and image together.

    A single block's values are a part of the joined product (flux/transformers/projections.py).
    """
    config: Any = transformer.config
    heads = (config.num_attention_heads, config.attention_head_dim)
    ones = partial(torch.ones, device=device, dtype=dtype)
    probe = ones(1, tokens, *heads)
    layouts = [probe]
    attention: Any = transformer.get_submodule("single_transformer_blocks.0.attn")
    if attention.fused_projections:
        layouts.append(ones(1, tokens, 3 * prod(heads)).chunk(3, dim=-1)[2].view(1, tokens, *heads))
    for values in layouts:
        dispatch_attention_fn(probe, probe, values, backend=backend)


def needs_plans(backend: AttentionBackendName, device: torch.device) -> bool:
    """Whether attention may build a plan for each number of tokens."""
    return (
        device.type == "cuda"
        and backend.value in BUILDS_PLANS
        and torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
        and torch.cuda.get_device_capability(device)[0] >= CAPABILITY
    )


def build_plans(
    attend_over: Callable[[int], None],
    token: int,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Attend in all sizes of the contract, as far as the time for it lasts.

    Args:
        attend_over: attends over a number of tokens.
        token: pixels along the side of a token.
        clock: tells the seconds.
    """
    lengths, start = lengths_of_sizes(token), clock()
    for done, tokens in enumerate(lengths):
        if (seconds := clock() - start) > LIMIT:
            logger.warning(
                "attention: plans for %d of %d numbers of tokens took %.1f s; the first image of "
                "another size takes longer",
                *(done, len(lengths), seconds),
            )
            return
        attend_over(tokens)
    logger.info("attention: %d numbers of tokens tried in %.1f s", len(lengths), clock() - start)


def lengths_of_sizes(token: int) -> list[int]:
    """Tokens of text and image in each ratio, for both megapixels and variants; each once.

    Args:
        token: pixels along the side of a token.
    """
    found = [
        variant.max_sequence_length + -(-width // part // token) * -(-height // part // token)
        for part in (1, 2)
        for variant in VARIANTS.values()
        for width, height in ASPECT_RATIOS.values()
    ]
    return list(dict.fromkeys(found))
