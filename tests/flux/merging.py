"""Adapters of every kind for one tiny FLUX, and ways to compare its weights."""

import copy

import torch

from flux.transformers.merge import WorkingWeights
from tests.support import tiny

SIZE = tiny.SIZES[0]
WIDTH = SIZE.width
Q = "transformer_blocks.0.attn.to_q"


def lora(module, rows, columns, rank, seed):
    down, up = tiny.factors(rows, columns, rank, seed)
    return {f"{module}.lora_A.weight": 0.1 * down, f"{module}.lora_B.weight": 0.1 * up}


def files():
    """Adapters of different rank, layers and kind, on all three components."""
    w = WIDTH
    text = "text_encoder.encoder.layers.0.mlp.fc1"
    kron = torch.randn(2, 2, generator=torch.Generator().manual_seed(1))
    whole = torch.randn(w // 2, w // 2, generator=torch.Generator().manual_seed(2))
    return {
        "a": lora(f"transformer.{Q}", w, w, 4, 1) | lora(text, 36, 20, 2, 2),
        "b": lora("double_blocks.0.img_attn.qkv", 3 * w, w, 8, 3)
        | lora("single_blocks.1.linear1", 7 * w, w, 3, 4),
        "c": {
            "lycoris_single_transformer_blocks_0_proj_mlp.lokr_w1": kron.repeat(4, 1),
            "lycoris_single_transformer_blocks_0_proj_mlp.lokr_w2": whole,
            "lora_te3_encoder_block_0_layer_0_SelfAttention_q.diff": torch.full((16, 24), 0.5),
        },
        "d": lora("double_blocks.0.img_attn.qkv", 3 * w, w, 4, 5)
        | {
            "double_blocks.0.img_attn.qkv.dora_scale": torch.full((1, w), 0.7),
            "double_blocks.0.img_attn.proj.diff_b": torch.full((w,), 0.25),
            "double_blocks.0.img_attn.norm.query_norm.diff": torch.full((16,), 0.5),
        },
        "e": rotations(w),
    }


def rotations(w):
    """An OFT, a BOFT and a GLoRA."""
    generator = torch.Generator().manual_seed(7)
    fused, linear1 = "double_blocks.0.txt_attn.qkv", "lora_unet_single_blocks_1_linear1"
    shapes = {
        f"{fused}.oft_blocks": (4, 3 * w // 4, 3 * w // 4),
        f"{fused}.diff_b": (3 * w,),
        f"{linear1}.oft_blocks": (2, 4, 7 * w // 4, 7 * w // 4),
        f"{Q.replace('to_q', 'to_out.0')}.oft_R.weight": (w // 4, 6),
        **{f"text_encoder.encoder.layers.0.mlp.fc1.{name}.weight": shape for name, shape in
           {"a1": (20, 2), "a2": (2, 20), "b1": (36, 2), "b2": (2, 20)}.items()},
    }  # fmt: skip
    return {key: 0.1 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def state(modules):
    return {
        (component, name): parameter.detach().clone()
        for component, module in modules.items()
        for name, parameter in module.named_parameters()
    }


def assert_bits(actual, expected):
    assert actual.keys() == expected.keys()
    different = [key for key in expected if not torch.equal(actual[key], expected[key])]
    assert different == []


def fresh(modules, desired):
    """What the weights are if nothing was ever merged before."""
    found = copy.deepcopy(modules)
    WorkingWeights(found).reconcile(desired)
    return state(found)


class Counted:
    """A store that notes what it writes, and fails at the n-th write after half of it."""

    def __init__(self, fail_at=None):
        self.fail_at = fail_at
        self.pointers = []

    def __call__(self, working, exact):
        self.pointers.append(working.data_ptr())
        if len(self.pointers) - 1 == self.fail_at:
            working.view(-1)[: working.numel() // 2].fill_(7)
            raise MemoryError("injected")
        working.copy_(exact)
