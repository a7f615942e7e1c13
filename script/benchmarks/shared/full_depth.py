"""A FLUX of full depth and reduced width, and rank-16 adapters on all of its linears."""

from pathlib import Path

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import save_file
from torch import nn

DOUBLE, SINGLE = 19, 38
HEADS, ROPE = 6, (16, 24, 24)
TEXT_WIDTH, POOLED_WIDTH, CHANNELS = 384, 192, 64
RANK = 16


def transformer(
    dtype: torch.dtype, heads: int = HEADS, blocks: tuple[int, int] = (DOUBLE, SINGLE)
) -> FluxTransformer2DModel:
    """Always the same random weights; 64 wide per head, of so many double and single blocks."""
    torch.manual_seed(0)
    found = FluxTransformer2DModel(
        patch_size=1,
        in_channels=CHANNELS,
        num_layers=blocks[0],
        num_single_layers=blocks[1],
        attention_head_dim=sum(ROPE),
        num_attention_heads=heads,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=ROPE,
    )
    return found.to(dtype).eval().requires_grad_(False)


def inputs(image_tokens: int, text_tokens: int) -> dict[str, object]:
    """Of one step."""
    return {
        "hidden_states": torch.ones(1, image_tokens, CHANNELS),
        "encoder_hidden_states": torch.ones(1, text_tokens, TEXT_WIDTH),
        "pooled_projections": torch.ones(1, POOLED_WIDTH),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.zeros(image_tokens, 3),
        "txt_ids": torch.zeros(text_tokens, 3),
        "return_dict": False,
    }


def linears(module: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}


def write_adapter(path: Path, module: nn.Module, seed: int) -> Path:
    """A rank-16 LoRA in ai-toolkit's format, bf16, small beside the weights."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, linear in linears(module).items():
        rows, columns = linear.weight.shape
        down = torch.randn(RANK, columns, generator=generator) / columns**0.5
        up = torch.randn(rows, RANK, generator=generator) * 0.01
        tensors[f"transformer.{name}.lora_A.weight"] = down.bfloat16()
        tensors[f"transformer.{name}.lora_B.weight"] = up.bfloat16()
    save_file(tensors, path)
    return path


def pipeline(found: FluxTransformer2DModel) -> FluxPipeline:
    """The least of a pipeline that can load adapters."""
    absent = dict.fromkeys(
        ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    )
    return FluxPipeline(transformer=found, **absent)


def parameter_shapes(found: nn.Module) -> dict[str, dict[str, torch.Size]]:
    return {"transformer": {name: p.shape for name, p in found.named_parameters()}}


def describe(found: FluxTransformer2DModel) -> dict[str, object]:
    return {
        "blocks": [len(found.transformer_blocks), len(found.single_transformer_blocks)],
        "width": found.inner_dim,
        "parameters": sum(p.numel() for p in found.parameters()),
        "linears": len(linears(found)),
        "rank": RANK,
    }
