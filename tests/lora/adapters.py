"""Adapter files of one module, and what becomes of them."""

import pytest
import torch

from lora.formats.errors import AdapterError
from tests.support import tiny

TO_Q = "transformer.transformer_blocks.0.attn.to_q"
RANK = 4
TO_OUT = "transformer_blocks.0.attn.to_out.0.weight"
PROJ = "lora_unet_double_blocks_0_img_attn_proj"
QKV = "lora_unet_double_blocks_0_img_attn_qkv"
QKV_PARTS = tuple(f"transformer_blocks.0.attn.to_{x}.weight" for x in "qkv")
FUSED = "lora_unet_single_blocks_1_linear1"
FUSED_PARTS = (
    *(f"single_transformer_blocks.1.attn.to_{x}.weight" for x in "qkv"),
    "single_transformer_blocks.1.proj_mlp.weight",
)


def width(flux):
    return flux["transformer"].norm_out.linear.weight.shape[1]


def lora(module, rows, columns, rank=RANK):
    down, up = tiny.factors(rows, columns, rank)
    return {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}


def refused(flux, tmp_path, tensors, match, metadata=None):
    with pytest.raises(AdapterError, match=match):
        tiny.load(tmp_path / "a", flux, tensors, metadata)


def weights(flux, names):
    parameters = dict(flux["transformer"].named_parameters())
    return [parameters[name].detach().double() for name in names]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def expect(flux, adapter, dense, names=FUSED_PARTS, rtol=1e-5):
    cut = dense.split([weight.shape[0] for weight in weights(flux, names)])
    expected = {("transformer", n): d for n, d in zip(names, cut, strict=True)}
    tiny.assert_same(tiny.deltas(adapter, flux), expected, rtol)


def dora(weight, delta, magnitude):
    """Liu et al. 2024: m (W + d) / norm(W + d), less W."""
    moved = weight + delta
    axis = 1 if magnitude.shape[1] == 1 else 0
    return magnitude.double() * moved / moved.norm(dim=axis, keepdim=True) - weight


def load(flux, tmp_path, module, tensors, **more):
    return tiny.load(
        tmp_path / "a", flux, {f"{module}.{role}": t for role, t in tensors.items()}, **more
    )


def cayley(blocks, constraint=float("inf")):
    """R = (I + Q) (I - Q)^-1 of each Q = B - B^T, with the norm of all Q limited."""
    skew = blocks.double() - blocks.double().transpose(-1, -2)
    norm = skew.norm()
    skew = skew * min(1.0, constraint / norm.item())
    eye = torch.eye(blocks.shape[-1], dtype=torch.float64)
    return (eye + skew) @ torch.linalg.inv(eye - skew)


def packed(columns, count, shared=False):
    size = columns // count
    return 0.2 * random(1 if shared else count, size * (size - 1) // 2)


def rotations(rows, columns):
    """One of each kind, of a weight of this shape."""
    size = rows // 4
    return {
        "OFT": {"oft_blocks": random(4, size, size)},
        "BOFT": {"oft_blocks": random(3, 4, size, size)},
        "OFT of inputs": {"oft_R.weight": packed(columns, 4)},
        "GLoRA": {
            "a1.weight": random(columns, 2),
            "a2.weight": random(2, columns),
            "b1.weight": random(rows, 2),
            "b2.weight": random(2, columns),
        },
    }
