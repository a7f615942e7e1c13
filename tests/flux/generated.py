"""Inductor's kernels for a Hopper card, made without one; test_card.py runs this.

The transformer's blocks have FLUX.1's widths, and no memory: they are fake tensors that say they
are on a card. Inductor writes its kernels for them as for real ones, and Triton compiles these.
Writes how many kernels each kind of block has.
"""

import re
import sys

import torch
import torch._inductor.compile_fx
from diffusers import FluxTransformer2DModel
from torch import Tensor
from torch._inductor import config, graph, scheduler
from torch._inductor.codecache import PyCodeCache
from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm
from torch._inductor.runtime import triton_helpers, triton_heuristics  # noqa: F401
from torch._subclasses.fake_tensor import FakeTensorMode

from flux.transformers.compile import Compilation
from flux.transformers.float8 import empty_float8, float8_parameters
from flux.transformers.skeleton import allocate, skeleton
from flux.variants import Key
from tests.flux import card

KERNEL = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str", re.DOTALL)
IMAGE, TEXT = 1023, 511  # tokens, as in the warm-up


def flash_attention(query: Tensor, key: Tensor, value: Tensor, **_: object) -> Tensor:
    """What scaled_dot_product_attention comes to on a card, and does not for fake tensors."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


class Generated(BaseException):
    """Inductor has written its code, and need not load it."""


def stop_before_it_is_loaded(lowering: graph.GraphLowering) -> None:
    code, _ = lowering.codegen()
    raise Generated(code.value)


def prepare_inductor() -> None:
    """Leave out what would run on a card: searches for patterns, and loading what is generated."""
    triton_helpers.set_driver_to_gpu = lambda: None
    scheduler.has_triton = lambda *_: True
    fuse_attention._sfdp_init = pad_mm._pad_mm_init = lambda *_: None
    misc_patterns._misc_patterns_init = lambda *_: None
    graph.GraphLowering.compile_to_module = stop_before_it_is_loaded
    torch.nn.functional.scaled_dot_product_attention = flash_attention
    config.fx_graph_cache, config.compile_threads = False, 1


def transformer(*, float8: bool) -> torch.nn.Module:
    """A block of each kind on the pretended card, in the form that serves."""
    with torch.device("meta"):
        base = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    found = skeleton(base, joined=True)
    names = float8_parameters(found) if float8 else frozenset()
    device = torch.device("cuda")

    def make(name: str, shape: torch.Size, _: torch.dtype) -> Tensor:
        if name in names:
            return empty_float8(shape, torch.bfloat16, device, dynamic=True)
        return torch.empty(shape, dtype=torch.bfloat16, device=device)

    with FakeTensorMode(allow_non_fake_inputs=True):
        allocate(found, make)
    return found


def generated(block: torch.nn.Module, width: int, head: int) -> str:
    """The code for one block, which is compiled by being called."""
    options = {"device": "cuda", "dtype": torch.bfloat16}
    rotary = [torch.empty(TEXT + IMAGE, head, device="cuda") for _ in range(2)]
    try:
        block(
            hidden_states=torch.empty(1, IMAGE, width, **options),
            encoder_hidden_states=torch.empty(1, TEXT, width, **options),
            temb=torch.empty(1, width, **options),
            image_rotary_emb=tuple(rotary),
        )
    except Generated as code:
        return str(code)
    raise AssertionError("the block was not compiled")


def compiled_kernels(code: str) -> int:
    """Compile all kernels, each for the first of the configurations that would be tried."""
    kernels = KERNEL.findall(code)
    for name, source in kernels:
        kernel = getattr(PyCodeCache.load(source), name)
        kernel._precompile_config(kernel.configs[0])
    return len(kernels)


def main() -> None:
    card.pretend()
    prepare_inductor()
    torch.set_grad_enabled(False)
    for precision in ("bf16", "fp8"):
        found = transformer(float8=precision == "fp8")
        Compilation({Key("dev", precision): found})
        head = found.config.attention_head_dim
        width = head * found.config.num_attention_heads
        for block in (found.transformer_blocks[0], found.single_transformer_blocks[0]):
            with FakeTensorMode(allow_non_fake_inputs=True):
                code = generated(block, width, head)
            sys.stdout.write(f"{precision} {type(block).__name__} {compiled_kernels(code)}\n")


if __name__ == "__main__":
    main()
