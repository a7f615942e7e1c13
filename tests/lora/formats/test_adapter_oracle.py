"""Formats that diffusers reads right: its own result is the expected value.

Two oracles. diffusers + PEFT load and fuse a whole adapter into real modules; and where its
converter insists on the real width (3072, for kohya's fused linear1), the converter alone.
"""

import copy

import pytest
import torch
from diffusers import FluxPipeline

from lora.formats.adapter import Targets, load_adapter
from tests.support import tiny

RANK = 4
KOHYA_DOUBLE = {
    "img_attn_qkv": 3,
    "txt_attn_qkv": 3,
    "img_attn_proj": 1,
    "txt_attn_proj": 1,
    "img_mod_lin": 6,
    "txt_mod_lin": 6,
}


def pair(module, rows, columns, names, seed=0):
    down, up = tiny.factors(rows, columns, RANK, seed)
    return {f"{module}.{names[0]}": down, f"{module}.{names[1]}": up}


def linears(flux, component, only=()):
    for name, module in flux[component].named_modules():
        wanted = not only or name.endswith(only)
        if isinstance(module, torch.nn.Linear) and wanted:
            yield name, module.weight.shape


def every_linear(flux):
    """Row 1."""
    names = ("lora_A.weight", "lora_B.weight")
    tensors = {}
    for name, (rows, columns) in linears(flux, "transformer"):
        tensors |= pair(f"transformer.{name}", rows, columns, names)
    return tensors


def some_linears_with_alpha(flux):
    """Row 2."""
    names = ("lora_A.weight", "lora_B.weight")
    tensors = {}
    for i, (name, (rows, columns)) in enumerate(linears(flux, "transformer", ("to_q", "proj_out"))):
        tensors |= pair(f"transformer.{name}", rows, columns, names, seed=i)
        tensors[f"transformer.{name}.alpha"] = torch.tensor(2.0)
    return tensors


def kohya(flux):
    """Row 6, without linear1."""
    width = flux["transformer"].norm_out.linear.weight.shape[1]
    names = ("lora_down.weight", "lora_up.weight")
    tensors = {}
    for name, times in KOHYA_DOUBLE.items():
        module = f"lora_unet_double_blocks_0_{name}"
        tensors |= pair(module, times * width, width, names)
        tensors[f"{module}.alpha"] = torch.tensor(2.0)
    return tensors


def kohya_split(flux):
    """Row 7."""
    width = flux["transformer"].norm_out.linear.weight.shape[1]
    parts = [tiny.factors(width, width, RANK, seed) for seed in range(3)]
    module = "lora_unet_double_blocks_0_txt_attn_qkv"
    return {
        f"{module}.lora_down.weight": torch.cat([down for down, _ in parts]),
        f"{module}.lora_up.weight": torch.block_diag(*(up for _, up in parts)),
        f"{module}.alpha": torch.tensor(6.0),
    }


def kohya_clip(flux):
    """Row 9, with a transformer layer beside it."""
    names = ("lora_down.weight", "lora_up.weight")
    tensors = kohya(flux)
    for name, (rows, columns) in linears(flux, "text_encoder", ("q_proj", "out_proj", "fc1")):
        module = f"lora_te1_text_model_{name.replace('.', '_')}"
        tensors |= pair(module, rows, columns, names)
        tensors[f"{module}.alpha"] = torch.tensor(2.0)
    return tensors


def xlabs(flux):
    """Row 13."""
    width = flux["transformer"].norm_out.linear.weight.shape[1]
    names = ("down.weight", "up.weight")
    tensors = {}
    for i in (1, 2):
        tensors |= pair(f"double_blocks.0.processor.qkv_lora{i}", 3 * width, width, names, i)
        tensors |= pair(f"double_blocks.0.processor.proj_lora{i}", width, width, names, i)
    tensors |= pair("single_blocks.1.processor.qkv_lora", 3 * width, width, names)
    return tensors | pair("single_blocks.1.processor.proj_lora", width, 5 * width, names)


def diffusers_and_kohya(flux):
    """Some of the modules are there twice, with other values."""
    return every_linear(flux) | kohya(flux)


def onetrainer_and_kohya(flux):
    tensors = kohya(flux)
    for name, (rows, columns) in linears(flux, "transformer", ("to_q", "to_add_out")):
        module = f"lora_transformer_{name.replace('.', '_')}"
        tensors |= pair(module, rows, columns, ("lora_down.weight", "lora_up.weight"))
        tensors[f"{module}.alpha"] = torch.tensor(2.0)
    return tensors


FORMATS = [
    every_linear,
    some_linears_with_alpha,
    kohya,
    kohya_split,
    kohya_clip,
    xlabs,
    diffusers_and_kohya,
    onetrainer_and_kohya,
]


def fused(flux, path, scale):
    """The parameters after diffusers loaded the file and PEFT fused it."""
    found = copy.deepcopy(flux)
    pipeline = FluxPipeline(
        scheduler=None,
        vae=None,
        text_encoder=found["text_encoder"],
        tokenizer=None,
        text_encoder_2=found["text_encoder_2"],
        tokenizer_2=None,
        transformer=found["transformer"],
    )
    pipeline.load_lora_weights(path)
    pipeline.fuse_lora(components=["transformer", "text_encoder"], lora_scale=scale)
    pipeline.unload_lora_weights()
    return {
        (component, name): parameter.detach()
        for component, module in found.items()
        for name, parameter in module.named_parameters()
    }


@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("scale", [1.0, 0.6])
@pytest.mark.filterwarnings("ignore")  # PEFT and diffusers have some of their own
def test_the_same_weights_as_diffusers_and_peft(flux, tmp_path, make, scale):
    tensors = make(flux)
    adapter = tiny.load(tmp_path / "a.safetensors", flux, tensors)
    ours = tiny.deltas(adapter, flux, scale)
    theirs = fused(flux, tmp_path / "a.safetensors", scale)
    assert any(key[0] == "text_encoder" for key in ours) == (make is kohya_clip)
    for key, weight in theirs.items():
        base = flux[key[0]].get_parameter(key[1]).detach()
        expected = base + ours[key] if key in ours else base
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(weight, base) == (key not in ours)


REAL_WIDTH = 3072


def test_kohyas_linear1_at_its_real_width(tmp_path):
    rows = {"attn.to_q": 1, "attn.to_k": 1, "attn.to_v": 1, "proj_mlp": 4}
    names = {f"single_transformer_blocks.0.{name}.weight": n for name, n in rows.items()}
    shapes = {name: torch.Size((n * REAL_WIDTH, REAL_WIDTH)) for name, n in names.items()}
    module = "lora_unet_single_blocks_0_linear1"
    tensors = pair(module, 7 * REAL_WIDTH, REAL_WIDTH, ("lora_down.weight", "lora_up.weight"))
    tensors[f"{module}.alpha"] = torch.tensor(2.0)
    path = tiny.save(tmp_path / "a.safetensors", tensors)
    adapter = load_adapter(path, "digest", Targets({"transformer": shapes}))
    converted = FluxPipeline.lora_state_dict(dict(tensors))
    assert len(adapter.parameters) == len(converted) // 2 == 4
    for component, name in adapter.parameters:
        scratch = torch.zeros(shapes[name])
        adapter.add_to(scratch, component, name, lambda *_: torch.empty(0), 1.0)
        key = f"transformer.{name.removesuffix('.weight')}"
        expected = converted[f"{key}.lora_B.weight"] @ converted[f"{key}.lora_A.weight"]
        torch.testing.assert_close(scratch, expected, rtol=1e-4, atol=1e-4)
