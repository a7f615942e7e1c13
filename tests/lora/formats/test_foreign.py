"""Rows 24 and 26, and kinds that are not read: the error names what the file is."""

import pytest
import torch

from tests.lora.adapters import TO_Q, lora, refused, width
from tests.support import tiny


@pytest.mark.parametrize("module", ["img_in", "transformer.x_embedder"])
def test_row_24_control_loras(flux, tmp_path, module):
    channels = 2 * flux["transformer"].x_embedder.weight.shape[1]
    size = width(flux)
    tensors = lora(module, size, channels) | lora("double_blocks.0.img_attn.qkv", 3 * size, size)
    refused(flux, tmp_path, tensors, "Control LoRA")


def test_row_24_control_loras_store_norm_scales(flux, tmp_path):
    tensors = lora("double_blocks.0.img_attn.qkv", 3 * width(flux), width(flux))
    tensors["double_blocks.0.img_attn.norm.query_norm.scale"] = torch.ones(3)
    refused(flux, tmp_path, tensors, "Control LoRA")


@pytest.mark.parametrize(
    ("beside", "metadata", "name"),
    [
        ("diffusion_model.double_stream_modulation_img.lin", {}, "FLUX.2"),
        ("diffusion_model.double_blocks.0.img_attn_qkv", {}, "HunyuanVideo"),
        (TO_Q, {"modelspec.architecture": "flux.2-dev/lora"}, "FLUX.2"),
    ],
)
def test_an_input_of_another_width_may_be_that_of_another_model(
    flux, tmp_path, beside, metadata, name
):
    size = width(flux)
    tensors = lora("diffusion_model.img_in", size, 7) | lora(beside, size, size)
    refused(flux, tmp_path, tensors, f"for {name}; a FLUX.1 adapter", metadata)


OTHER_MODELS = {
    "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": "Stable Diffusion 1.5",
    "lora_unet_input_blocks_4_1_proj_in.lora_up.weight": "Stable Diffusion",
    "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": "Stable Diffusion XL",
    "unet.mid_block.attentions.0.proj_in.lora_A.weight": "Stable Diffusion",
    "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": "Stable Diffusion 3",
    "transformer.double_stream_modulation_img.linear.lora_A.weight": "FLUX.2",
    "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_A.weight": "FLUX.2",
    "diffusion_model.double_blocks.0.img_attn_qkv.lora_A.weight": "HunyuanVideo",
    "transformer.transformer_blocks.0.img_mod.1.lora_A.weight": "Qwen-Image",
    "diffusion_model.blocks.0.cross_attn.q.lora_A.weight": "Wan",
    "diffusion_model.distilled_guidance_layer.in_proj.lora_A.weight": "Chroma",
    "model.diffusion_model.input_blocks.0.0.weight": "Stable Diffusion",
    "transformer_blocks.0.attn.to_q.weight": "full FLUX.1 checkpoint",
    "model.diffusion_model.double_blocks.0.img_attn.qkv.weight": "full FLUX.1 checkpoint",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1.weight": "full text encoder",
    "decoder.conv_in.weight": "VAE",
}


@pytest.mark.parametrize(("key", "name"), OTHER_MODELS.items())
def test_row_26_other_models_are_named(flux, tmp_path, key, name):
    refused(flux, tmp_path, {key: torch.ones(4, 4)}, name)


KINDS = {
    "base_model.model.transformer_blocks.0.attn.to_q.vera_lambda_b": "a VeRA adapter",
    "base_model.vera_A": "a VeRA adapter",
    "transformer_blocks.0.attn.processor.to_q_lora.q_layer.weight": "a T-LoRA",
    "lycoris_transformer_blocks_0_attn_to_q.lambda_layer": "a T-LoRA",
    "transformer_blocks.0.mlp_fc1.lora_down": "packed for nunchaku",
    "transformer_blocks.0.mlp_context_fc1.qweight": "packed for nunchaku",
    "single_transformer_blocks.0.qkv_proj.lora_up": "packed for nunchaku",
    "double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight": "an IP-Adapter",
    "ip_adapter.0.to_k_ip.weight": "an IP-Adapter",
    "controlnet_blocks.0.weight": "a ControlNet",
    "input_hint_block.0.weight": "a ControlNet",
    "base_model.model.transformer_blocks.0.attn.to_q.ia3_l": "an IA3",
    "lycoris_transformer_blocks_0_attn_to_q.on_input": "an IA3",
    "base_model.model.transformer_blocks.0.attn.to_q.boft_R": "a BOFT of PEFT",
    "base_model.model.transformer_blocks.0.attn.to_q.boft_s": "a BOFT of PEFT",
    "redux_up.weight": "FLUX.1 Redux",
    "oft_unet_double_blocks_0_img_attn_qkv.oft_blocks.0": "an OFT of sd-scripts",
}


@pytest.mark.parametrize(("key", "name"), KINDS.items())
def test_kinds_that_are_not_read_are_named(flux, tmp_path, key, name):
    whole = {"transformer_blocks.0.attn.to_q.weight": torch.ones(4, 4)}
    for beside in ({}, whole, lora(TO_Q, width(flux), width(flux))):
        refused(flux, tmp_path, {key: torch.ones(4, 4)} | beside, f"this file is {name}, .*LoKr")


def test_the_words_of_bundled_embeddings_mean_nothing(flux, tmp_path):
    """A user may name a token like a part of another model."""
    tensors = lora(TO_Q, width(flux), width(flux))
    words = {f"bundle_emb.{word}.clip_l": torch.ones(2, 3) for word in ("redux_me", "cross_attn")}
    assert tiny.load(tmp_path / "a", flux, tensors | words).modules == 1


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("rows", [None, 3])
def test_textual_inversion_alone_is_named(flux, tmp_path, component, rows):
    size = flux[component].get_input_embeddings().weight.shape[1]
    words = torch.ones(size) if rows is None else torch.ones(rows, size)
    refused(flux, tmp_path, {"<token>": words}, r"textual inversion \('<token>'\)")
    refused(flux, tmp_path, {"<token>": words[..., 1:]}, "no key of the file")


@pytest.mark.parametrize(
    ("times", "metadata", "name"),
    [
        (6, {}, "FLUX.1 Fill model"),
        (2, {}, "FLUX.1 Canny or Depth model"),
        (1, {}, "FLUX.1 checkpoint .*Krea or Kontext"),
        (3, {}, "FLUX.1 checkpoint"),
        (1, {"modelspec.title": "FLUX.1-Kontext-dev"}, "FLUX.1 Kontext checkpoint"),
        (1, {"modelspec.architecture": "flux-1-krea"}, "FLUX.1 Krea checkpoint"),
    ],
)
@pytest.mark.parametrize("module", ["img_in", "model.diffusion_model.img_in", "x_embedder"])
def test_full_models_are_named(flux, tmp_path, times, metadata, name, module):
    rows, columns = flux["transformer"].x_embedder.weight.shape
    tensors = {
        "double_blocks.0.img_attn.qkv.weight": torch.ones(4, 4),
        f"{module}.bias": torch.ones(rows),
        f"{module}.weight": torch.ones(rows, times * columns),
    }
    refused(flux, tmp_path, tensors, f"this file is a full {name}.*not an adapter", metadata)


@pytest.mark.parametrize(
    ("metadata", "name"),
    [
        ({"modelspec.architecture": "Flux.2-dev/lora"}, "FLUX.2"),
        ({"modelspec.architecture": "chroma/lora"}, "Chroma"),
        ({"ss_base_model_version": "sd_1.5", "modelspec.architecture": "qwen-image"}, "Qwen-Image"),
    ],
)
def test_row_26_the_header_may_tell(flux, tmp_path, metadata, name):
    refused(flux, tmp_path, lora(TO_Q, width(flux), width(flux)), name, metadata)


@pytest.mark.parametrize(
    ("metadata", "name"),
    [
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "Stable Diffusion XL"),
        ({"ss_base_model_version": "sd_v1"}, "Stable Diffusion 1.5"),
    ],
)
def test_row_26_the_header_tells_where_only_the_text_encoder_matches(
    flux, tmp_path, metadata, name
):
    rows, columns = flux["text_encoder"].encoder.layers[0].mlp.fc1.weight.shape
    tensors = lora("lora_te_text_model_encoder_layers_0_mlp_fc1", rows, columns)
    refused(flux, tmp_path, tensors, name, metadata)
    assert tiny.load(tmp_path / "a", flux, tensors).modules == 1


@pytest.mark.parametrize(
    "metadata",
    [
        {"modelspec.architecture": "flux-1-dev/lora", "ss_base_model_version": "flux1"},
        {"ss_base_model_version": "sd_1.5"},  # ai-toolkit, before it had a name for FLUX.1
        {"modelspec.architecture": "stable-diffusion-v1/lora", "ss_base_model_version": "flux1"},
    ],
)
def test_what_headers_say_of_flux_1(flux, tmp_path, metadata):
    """The last is what sd-scripts' svd_merge_lora.py writes."""
    tensors = lora(TO_Q, width(flux), width(flux))
    assert tiny.load(tmp_path / "a", flux, tensors, metadata).modules == 1
