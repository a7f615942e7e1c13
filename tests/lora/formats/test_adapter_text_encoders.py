"""Rows 9 and 10 of the format table: adapters of CLIP and T5."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from lora.formats.adapter import Targets, load_adapter
from tests.support import tiny

ALPHA, RANK = 2.0, 4
KOHYA, PEFT = ("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight")

TEXT_ENCODERS = [
    (9, "lora_te1_text_model_encoder_layers_1_self_attn_q_proj", KOHYA, "text_encoder"),
    (9, "lora_te_text_model_encoder_layers_1_self_attn_q_proj", KOHYA, "text_encoder"),
    (9, "lora_clip_text_model_encoder_layers_1_self_attn_q_proj", KOHYA, "text_encoder"),
    (9, "lora_te1.text_model.encoder.layers.1.self_attn.q_proj", PEFT, "text_encoder"),
    (9, "text_encoder.text_model.encoder.layers.1.self_attn.q_proj", PEFT, "text_encoder"),
    (9, "text_encoder.encoder.layers.1.self_attn.q_proj", PEFT, "text_encoder"),
    (
        9,
        "text_encoders.clip_l.transformer.text_model.encoder.layers.1.self_attn.q_proj",
        KOHYA,
        "text_encoder",
    ),
    (10, "lora_te3_encoder_block_1_layer_0_SelfAttention_q", KOHYA, "text_encoder_2"),
    (10, "lora_t5_encoder_block_1_layer_0_SelfAttention_q", KOHYA, "text_encoder_2"),
    (10, "lora_te2_encoder_block_1_layer_0_SelfAttention_q", KOHYA, "text_encoder_2"),
    (10, "text_encoder_2.encoder.block.1.layer.0.SelfAttention.q", PEFT, "text_encoder_2"),
    (
        10,
        "text_encoders.t5xxl.transformer.encoder.block.1.layer.0.SelfAttention.q",
        KOHYA,
        "text_encoder_2",
    ),
]


@pytest.mark.parametrize(("row", "module", "roles", "component"), TEXT_ENCODERS)
def test_text_encoders(flux, tmp_path, row, module, roles, component):
    name = {
        "text_encoder": "encoder.layers.1.self_attn.q_proj",
        "text_encoder_2": "encoder.block.1.layer.0.SelfAttention.q",
    }[component]
    rows, columns = flux[component].get_submodule(name).weight.shape
    down, up = tiny.factors(rows, columns, RANK)
    tensors = {
        f"{module}.{roles[0]}": down,
        f"{module}.{roles[1]}": up,
        f"{module}.alpha": torch.tensor(ALPHA),
    }
    adapter = tiny.load(tmp_path / "a.safetensors", flux, tensors)
    expected = {(component, f"{name}.weight"): ALPHA / RANK * up.double() @ down.double()}
    tiny.assert_same(tiny.deltas(adapter, flux), expected)


def test_clip_of_older_transformers_has_one_more_level(tmp_path):
    """transformers 4 names CLIP's modules `text_model.encoder...`; both spellings reach them."""
    name = "text_model.encoder.layers.0.mlp.fc1"
    shapes = {"text_encoder": {f"{name}.weight": torch.Size((6, 5))}}
    down, up = tiny.factors(6, 5, RANK)
    for spelling in (f"text_encoder.{name}", "lora_te1_text_model_encoder_layers_0_mlp_fc1"):
        path = tiny.save(
            tmp_path / "a", {f"{spelling}.lora_A.weight": down, f"{spelling}.lora_B.weight": up}
        )
        adapter = load_adapter(path, "digest", Targets(shapes))
        assert adapter.parameters == {("text_encoder", f"{name}.weight")}


@pytest.mark.parametrize(
    "pattern",
    [
        "text_model.encoder.layers.1.self_attn.q_proj",
        "^text_model.encoder.layers.1.self_attn.q_proj",
        "text_model.encoder.layers.0.self_attn.q_proj",
        "encoder.layers.1.self_attn.q_proj",
        "q_proj",
        "k_proj",
    ],
)
@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match")
def test_an_alpha_pattern_has_the_names_of_the_trainers_transformers(flux, tmp_path, pattern):
    """With transformers 4, from which most files are; PEFT's own difference is expected."""
    name = "encoder.layers.1.self_attn.q_proj"
    config = LoraConfig(
        r=RANK, lora_alpha=6, alpha_pattern={pattern: 16}, target_modules=[f"text_model.{name}"]
    )
    trained = torch.nn.ModuleDict({"text_model": copy.deepcopy(flux["text_encoder"])})
    layer = inject_adapter_in_model(config, trained).get_submodule(f"text_model.{name}")
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    module = f"text_encoder.text_model.{name}"
    tensors = {
        f"{module}.lora_{x}.weight": getattr(layer, f"lora_{x}")["default"].weight.detach()
        for x in "AB"
    }
    settings = {"text_encoder.lora_alpha": 6, "text_encoder.alpha_pattern": {pattern: 16}}
    metadata = {"lora_adapter_metadata": json.dumps(settings)}
    adapter = tiny.load(tmp_path / "a", flux, tensors, metadata)
    expected = {("text_encoder", f"{name}.weight"): layer.get_delta_weight("default").detach()}
    tiny.assert_same(tiny.deltas(adapter, flux), expected)
