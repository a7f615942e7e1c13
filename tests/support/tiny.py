"""Tiny FLUX.1 modules of two sizes, and adapter files for them."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from flux.transformers.base_weights import BaseWeights
from lora.formats.adapter import Adapter, Targets, load_adapter


@dataclass(frozen=True)
class Size:
    double: int
    single: int
    heads: int
    rope: tuple[int, int, int]
    guidance: bool = True

    @property
    def width(self) -> int:
        return self.heads * sum(self.rope)


SIZES = (Size(2, 3, 2, (4, 6, 6)), Size(1, 2, 3, (2, 2, 4)))


def modules(size: Size, dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
    """A transformer, a CLIP and a T5 with random weights, as a FluxPipeline names them."""
    torch.manual_seed(size.width)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=size.double,
        num_single_layers=size.single,
        attention_head_dim=sum(size.rope),
        num_attention_heads=size.heads,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=size.guidance,
        axes_dims_rope=size.rope,
    )
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=40,
            hidden_size=20,
            intermediate_size=36,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=40,
            d_model=24,
            d_kv=8,
            d_ff=28,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )
    found = {"transformer": transformer, "text_encoder": clip, "text_encoder_2": t5}
    return {name: module.to(dtype).eval() for name, module in found.items()}


def shapes(found: dict[str, nn.Module]) -> dict[str, dict[str, torch.Size]]:
    return {
        component: {name: parameter.shape for name, parameter in module.named_parameters()}
        for component, module in found.items()
    }


def transformers(dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
    """A dev and a schnell of one size."""
    sizes = {"dev": SIZES[0], "schnell": replace(SIZES[0], guidance=False)}
    return {name: modules(size, dtype)["transformer"] for name, size in sizes.items()}


def opened(found: dict[str, nn.Module]) -> dict[str, BaseWeights]:
    """Transformers as base copies, each to be opened as it is."""
    return {name: BaseWeights(name, m, lambda m=m: m, Path(name)) for name, m in found.items()}


def factors(
    rows: int, columns: int, rank: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """(down [rank, columns], up [rows, rank])."""
    generator = torch.Generator().manual_seed(1000 * seed + rows + columns)
    down = torch.randn(rank, columns, generator=generator)
    return down.to(dtype), torch.randn(rows, rank, generator=generator).to(dtype)


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path, metadata)
    return path


def load(
    path: Path,
    found: dict[str, nn.Module],
    tensors: dict[str, Tensor],
    metadata: dict[str, str] | None = None,
    digest: str = "digest",
) -> Adapter:
    """Write `tensors` to `path` and load them as an adapter for the modules `found`."""
    return load_adapter(save(path, tensors, metadata), digest, Targets(shapes(found)))


def deltas(
    adapter: Adapter, found: dict[str, nn.Module], scale: float = 1.0
) -> dict[tuple[str, str], Tensor]:
    """What the adapter adds to each parameter it names, fp32."""
    weights = {
        (component, name): parameter.detach()
        for component, module in found.items()
        for name, parameter in module.named_parameters()
    }
    result = {}
    for component, name in adapter.parameters:
        scratch = torch.zeros(weights[component, name].shape)
        adapter.add_to(scratch, component, name, lambda c, n: weights[c, n], scale)
        result[component, name] = scratch
    return result


def assert_same(actual: dict, expected: dict, rtol: float = 1e-5) -> None:
    """The same parameters change, each by the same amount."""
    assert actual.keys() == expected.keys()
    for key, delta in expected.items():
        torch.testing.assert_close(
            actual[key].double(), delta.double(), rtol=rtol, atol=rtol * float(delta.abs().max())
        )
        assert delta.abs().max() > 0
