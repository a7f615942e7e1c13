"""Rows of the format table that spell a plain LoRA: the same delta under every name.

Expected values are written out in float64 from the published rule: alpha / rank * up @ down.
"""

import json

import pytest
import torch

from lora.formats.errors import AdapterError
from tests.support import tiny

RANK = 4


def width(flux):
    return flux["transformer"].config.num_attention_heads * (
        flux["transformer"].config.attention_head_dim
    )


def plain(down, up, alpha=None):
    return (1.0 if alpha is None else alpha / RANK) * up.double() @ down.double()


# (row of the table, module's key without the role, names of down and up, alpha's key or None)
SPELLINGS = [
    (1, "transformer.transformer_blocks.0.attn.to_q", "lora_A.weight", "lora_B.weight", None),
    (2, "transformer.transformer_blocks.0.attn.to_q", "lora_A.weight", "lora_B.weight", 2.0),
    (4, "transformer_blocks.0.attn.to_q", "lora_A.weight", "lora_B.weight", None),
    (
        5,
        "transformer.transformer_blocks.0.attn.to_q",
        "lora_A.default.weight",
        "lora_B.default.weight",
        None,
    ),
    (11, "lora_unet_transformer_blocks_0_attn_to_q", "lora_down.weight", "lora_up.weight", 2.0),
    (11, "lora_unet_transformer_blocks_0_attn_to_q_", "lora_down.weight", "lora_up.weight", 2.0),
    (12, "transformer.transformer_blocks.0.attn.to_q", "lora_down.weight", "lora_up.weight", 2.0),
    (16, "base_model.model.transformer_blocks.0.attn.to_q", "lora_A.weight", "lora_B.weight", None),
    (
        17,
        "lora_transformer_transformer_blocks_0_attn_to_q",
        "lora_down.weight",
        "lora_up.weight",
        2.0,
    ),
    (0, "transformer.double_blocks.0.img_attn.qkv.0", "lora_down.weight", "lora_up.weight", 2.0),
    (0, "lycoris_transformer_blocks_0_attn_to_q", "lora_down.weight", "lora_up.weight", 2.0),
    (0, "unet.transformer_blocks.0.attn.to_q", "lora_A.weight", "lora_B.weight", None),
    (0, "unet.base_model.model.transformer_blocks.0.attn.to_q", "lora_A.weight", "lora_B.weight",
     None),
    (0, "lora_unet__transformer_blocks_0_attn_to_q", "lora_down.weight", "lora_up.weight", 2.0),
    (0, "transformer.transformer_blocks.0.attn.to_q", "lora_linear_layer.down.weight",
     "lora_linear_layer.up.weight", None),
    (0, "transformer.transformer_blocks.0.attn.processor.to_q_lora", "down.weight", "up.weight",
     None),
    (0, "unet.transformer_blocks.0.attn.processor.to_q_lora", "down.weight", "up.weight", None),
]  # fmt: skip


@pytest.mark.parametrize(("row", "module", "a", "b", "alpha"), SPELLINGS)
def test_one_module_under_each_of_its_names(flux, tmp_path, row, module, a, b, alpha):
    down, up = tiny.factors(width(flux), width(flux), RANK)
    tensors = {f"{module}.{a}": down, f"{module}.{b}": up}
    if alpha is not None:
        tensors[f"{module}.alpha"] = torch.tensor(alpha)
    adapter = tiny.load(tmp_path / "a.safetensors", flux, tensors)
    key = ("transformer", "transformer_blocks.0.attn.to_q.weight")
    tiny.assert_same(tiny.deltas(adapter, flux), {key: plain(down, up, alpha)})
    assert adapter.modules == 1
    assert adapter.ignored == ()
    assert adapter.nbytes == sum(t.numel() * t.element_size() for t in tensors.values())


def test_row_2_alpha_may_be_an_integer(flux, tmp_path):
    down, up = tiny.factors(width(flux), width(flux), RANK)
    module = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    tensors[f"{module}.alpha"] = torch.tensor([8])
    adapter = tiny.load(tmp_path / "a.safetensors", flux, tensors)
    key = ("transformer", "transformer_blocks.0.attn.to_q.weight")
    tiny.assert_same(tiny.deltas(adapter, flux), {key: plain(down, up, 8)})


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [
        ({"transformer.lora_alpha": 6, "transformer.r": RANK}, 6 / RANK),
        ({"transformer.lora_alpha": 6, "transformer.use_rslora": True}, 6 / RANK**0.5),
        ({"lora_alpha": 6, "r": RANK}, 6 / RANK),
        (
            {
                "transformer.lora_alpha": 6,
                "transformer.alpha_pattern": {"transformer_blocks.0.attn.to_q": 3},
            },
            3 / RANK,
        ),
        (
            {"transformer.lora_alpha": 6, "transformer.alpha_pattern": {"attn.to_k": 3}},
            6 / RANK,
        ),
        ({"transformer.lora_alpha": 6, "transformer.alpha_pattern": {"o_q": 3}}, 6 / RANK),
        ({"text_encoder.lora_alpha": 6}, 1.0),
    ],
)
def test_row_3_alpha_in_the_header(flux, tmp_path, settings, scaling):
    down, up = tiny.factors(width(flux), width(flux), RANK)
    module = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    metadata = {"lora_adapter_metadata": json.dumps(settings)}
    adapter = tiny.load(tmp_path / "a.safetensors", flux, tensors, metadata)
    key = ("transformer", "transformer_blocks.0.attn.to_q.weight")
    tiny.assert_same(tiny.deltas(adapter, flux), {key: scaling * plain(down, up)})


@pytest.mark.parametrize(
    "text",
    [
        "[1]",
        "{",
        json.dumps({"transformer.lora_alpha": -4}),
        json.dumps({"transformer.lora_alpha": 4, "transformer.alpha_pattern": {".*to_q": 2}}),
    ],
)
def test_row_3_a_bad_header_is_refused(flux, tmp_path, text):
    down, up = tiny.factors(width(flux), width(flux), RANK)
    module = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    with pytest.raises(AdapterError, match=r"lora_a|alpha_pattern"):
        tiny.load(tmp_path / "a", flux, tensors, {"lora_adapter_metadata": text})


# (row, fused module's key, roles, alpha, parameters of the model in the order of rows)
Q_K_V = tuple(f"transformer_blocks.0.attn.to_{x}" for x in "qkv")
ADDED = tuple(f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv")
SINGLE_QKV = tuple(f"single_transformer_blocks.1.attn.to_{x}" for x in "qkv")
LINEAR1 = (*SINGLE_QKV, "single_transformer_blocks.1.proj_mlp")
KOHYA, PEFT, XLABS = (
    ("lora_down.weight", "lora_up.weight"),
    ("lora_A.weight", "lora_B.weight"),
    ("down.weight", "up.weight"),
)
FUSED = [
    (6, "lora_unet_double_blocks_0_img_attn_qkv", KOHYA, 2.0, Q_K_V),
    (6, "lora_unet_double_blocks_0_img_attn_qkv", KOHYA, None, Q_K_V),
    (6, "lora_unet_double_blocks_0_txt_attn_qkv", KOHYA, 2.0, ADDED),
    (6, "lora_unet_single_blocks_1_linear1", KOHYA, 2.0, LINEAR1),
    (6, "lora_unet_single_blocks_1_linear2", KOHYA, 2.0, ("single_transformer_blocks.1.proj_out",)),
    (13, "double_blocks.0.processor.qkv_lora1", XLABS, None, Q_K_V),
    (13, "double_blocks.0.processor.qkv_lora2", XLABS, None, ADDED),
    (
        13,
        "double_blocks.0.processor.proj_lora1",
        XLABS,
        None,
        ("transformer_blocks.0.attn.to_out.0",),
    ),
    (
        13,
        "double_blocks.0.processor.proj_lora2",
        XLABS,
        None,
        ("transformer_blocks.0.attn.to_add_out",),
    ),
    (13, "single_blocks.1.processor.qkv_lora", XLABS, None, SINGLE_QKV),
    (
        13,
        "single_blocks.1.processor.proj_lora",
        XLABS,
        None,
        ("single_transformer_blocks.1.proj_out",),
    ),
    (14, "double_blocks.0.img_attn.qkv", PEFT, None, Q_K_V),
    (14, "single_blocks.1.linear1", PEFT, 2.0, LINEAR1),
    (15, "diffusion_model.double_blocks.0.img_attn.qkv", PEFT, None, Q_K_V),
    (15, "diffusion_model.single_blocks.1.linear1", KOHYA, 2.0, LINEAR1),
    (16, "base_model.model.double_blocks.0.img_attn.qkv", PEFT, None, Q_K_V),
    (16, "base_model.model.single_blocks.1.linear1", PEFT, None, LINEAR1),
]


@pytest.mark.parametrize(("row", "module", "roles", "alpha", "parts"), FUSED)
def test_fused_modules_are_cut_by_rows(flux, tmp_path, row, module, roles, alpha, parts):
    weights = [flux["transformer"].get_submodule(name).weight for name in parts]
    rows, columns = [weight.shape[0] for weight in weights], weights[0].shape[1]
    down, up = tiny.factors(sum(rows), columns, RANK)
    tensors = {f"{module}.{roles[0]}": down, f"{module}.{roles[1]}": up}
    if alpha is not None:
        tensors[f"{module}.alpha"] = torch.tensor(alpha)
    adapter = tiny.load(tmp_path / "a.safetensors", flux, tensors)
    cut = plain(down, up, alpha).split(rows)
    expected = {("transformer", f"{n}.weight"): d for n, d in zip(parts, cut, strict=True)}
    tiny.assert_same(tiny.deltas(adapter, flux), expected)


def test_row_7_split_qkv_is_block_diagonal(flux, tmp_path):
    """Stored rank is 3r, stored alpha 3 x alpha: each part is (alpha / r) up_i @ down_i."""
    size, module = width(flux), "lora_unet_double_blocks_0_img_attn_qkv"
    pairs = [tiny.factors(size, size, RANK, seed=i) for i in range(3)]
    tensors = {
        f"{module}.lora_down.weight": torch.cat([down for down, _ in pairs]),
        f"{module}.lora_up.weight": torch.block_diag(*(up for _, up in pairs)),
        f"{module}.alpha": torch.tensor(3 * 2.0),
    }
    adapter = tiny.load(tmp_path / "a.safetensors", flux, tensors)
    expected = {
        ("transformer", f"{name}.weight"): plain(down, up, 2.0)
        for name, (down, up) in zip(Q_K_V, pairs, strict=True)
    }
    tiny.assert_same(tiny.deltas(adapter, flux), expected)


EVERY_LAYER = {
    "lora_unet_img_in": "x_embedder",
    "lora_unet_txt_in": "context_embedder",
    "lora_unet_time_in_in_layer": "time_text_embed.timestep_embedder.linear_1",
    "lora_unet_time_in_out_layer": "time_text_embed.timestep_embedder.linear_2",
    "lora_unet_vector_in_in_layer": "time_text_embed.text_embedder.linear_1",
    "lora_unet_vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
    "lora_unet_guidance_in_in_layer": "time_text_embed.guidance_embedder.linear_1",
    "lora_unet_guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
    "lora_unet_final_layer_linear": "proj_out",
    "lora_unet_double_blocks_0_img_mod_lin": "transformer_blocks.0.norm1.linear",
    "lora_unet_double_blocks_0_txt_mod_lin": "transformer_blocks.0.norm1_context.linear",
    "lora_unet_single_blocks_0_modulation_lin": "single_transformer_blocks.0.norm.linear",
    "lora_unet_final_layer_adaLN_modulation_1": "norm_out.linear",
}


def test_row_8_kohya_on_every_layer(flux, tmp_path):
    tensors, expected = {}, {}
    for spelling, name in EVERY_LAYER.items():
        rows, columns = flux["transformer"].get_submodule(name).weight.shape
        down, up = tiny.factors(rows, columns, RANK)
        tensors[f"{spelling}.lora_down.weight"] = down
        tensors[f"{spelling}.lora_up.weight"] = up
        tensors[f"{spelling}.alpha"] = torch.tensor(8.0)
        delta = plain(down, up, 8.0)
        if name == "norm_out.linear":  # BFL's (shift, scale) is (scale, shift) here
            shift, scale = delta.chunk(2)
            delta = torch.cat([scale, shift])
        expected["transformer", f"{name}.weight"] = delta
    adapter = tiny.load(tmp_path / "a.safetensors", flux, tensors)
    tiny.assert_same(tiny.deltas(adapter, flux), expected)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, ()),
        ({"modelspec.trigger_phrase": " TOK  style "}, ("TOK style",)),
        ({"instance_prompt": "a photo of sks dog"}, ("a photo of sks dog",)),
        (
            {"ss_tag_frequency": json.dumps({"10_x": {"ohwx man": 12, "smiling": 3}})},
            ("ohwx man",),
        ),
        ({"ss_tag_frequency": json.dumps({"1_TOK": {"TOK": 1}})}, ("TOK",)),  # ai-toolkit's
        ({"ss_tag_frequency": json.dumps({"1_x": {"a long caption": 1, "another": 1}})}, ()),
        ({"ss_tag_frequency": "[[["}, ()),
        ({"ss_tag_frequency": json.dumps({"a": 1, "b": {"x": "y"}})}, ()),
    ],
)
def test_trigger_words(flux, tmp_path, metadata, words):
    down, up = tiny.factors(width(flux), width(flux), RANK)
    module = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    adapter = tiny.load(tmp_path / "a.safetensors", flux, tensors, metadata)
    assert adapter.trigger_words == words


def test_the_description_names_dialect_names_and_kind(flux, tmp_path):
    down, up = tiny.factors(3 * width(flux), width(flux), RANK)
    module = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
    adapter = tiny.load(tmp_path / "a.safetensors", flux, tensors)
    assert adapter.format == "kohya keys, BFL names, LoRA"
    assert adapter.digest == "digest"
