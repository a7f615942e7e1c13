"""Row 25, and every way in which a file can fail to fit: an error that says so."""

import struct

import pytest
import torch

from lora.formats import adapter as adapter_module
from lora.formats.errors import AdapterError
from tests.lora.adapters import RANK, TO_Q, lora, refused, width
from tests.support import tiny

QKV = "lora_unet_double_blocks_0_img_attn_qkv"


@pytest.mark.parametrize("key", ["clip_l", "t5", "bundle_emb.TOK.clip_l_out", "bundle_emb.TOK.t5"])
def test_row_25_embeddings_are_ignored_and_reported(flux, tmp_path, key):
    tensors = lora(TO_Q, width(flux), width(flux)) | {key: torch.ones(2, 3)}
    adapter = tiny.load(tmp_path / "a", flux, tensors)
    assert adapter.ignored == (key,)
    assert adapter.modules == 1
    refused(flux, tmp_path, {key: torch.ones(2, 3)}, "textual inversion")


def test_nothing_matched(flux, tmp_path):
    refused(flux, tmp_path, {"foo.lora_A.weight": torch.ones(2, 2)}, "no key .*'foo.lora_A.weight'")


def test_an_empty_file(flux, tmp_path):
    path = tmp_path / "a"
    path.write_bytes(struct.pack("<Q", 2) + b"{}")
    with pytest.raises(AdapterError, match="the file holds no tensors"):
        adapter_module.load_adapter(path, "d", tiny.Targets(tiny.shapes(flux)))


@pytest.mark.parametrize(
    "key",
    [
        "transformer.transformer_blocks.7.attn.to_q.lora_A.weight",
        "transformer.transformer_blocks.0.attn.to_q.oft_r.weight",
        "lora_unet_double_blocks_0_img_attn_qkx.alpha",
        "lora_te1_text_model_encoder_layers_9_mlp_fc1.lora_up.weight",
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.r.lora_A.weight",
        "something",
    ],
)
def test_an_unknown_key_is_named(flux, tmp_path, key):
    tensors = lora(TO_Q, width(flux), width(flux)) | {key: torch.ones(2, 2)}
    refused(flux, tmp_path, tensors, f"1 of 3 keys are unknown .*{key}")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (TO_Q, "transformer_blocks.0.attn.to_q"),
        ("lora_unet_double_blocks_0_img_attn_proj", "lora_unet_transformer_blocks_0_attn_to_out_0"),
        ("lycoris_transformer_blocks_0_attn_to_q", "lora_unet_transformer_blocks_0_attn_to_q"),
        ("double_blocks.0.img_attn.proj", "transformer.transformer_blocks.0.attn.to_out.0"),
        ("lora_unet_double_blocks_0_img_attn_proj", "double_blocks.0.processor.proj_lora1"),
    ],
)
def test_two_spellings_of_a_module(flux, tmp_path, first, second):
    size = width(flux)
    refused(
        flux, tmp_path, lora(first, size, size) | lora(second, size, size), "two spellings of tr"
    )


def test_a_fused_module_and_a_part_of_it(flux, tmp_path):
    size = width(flux)
    part = TO_Q.removeprefix("transformer.")
    tensors = lora(QKV, 3 * size, size) | lora(part, size, size)
    refused(flux, tmp_path, tensors, "two spellings of transformer_blocks.0.attn.to_q")


def test_two_spellings_of_a_tensor(flux, tmp_path):
    tensors = lora(TO_Q, width(flux), width(flux))
    for extra in (f"{TO_Q}.lora_down.weight", f"{TO_Q}.lora_A.default.weight"):
        again = tensors | {extra: tensors[f"{TO_Q}.lora_A.weight"]}
        refused(flux, tmp_path, again, "two spellings of the same tensor")


INCOMPLETE = {
    "half a LoRA": ("lora_A.weight",),
    "half a LoHa": ("hada_w1_a", "hada_w1_b"),
    "half a LoKr": ("lokr_w1",),
    "two kinds": ("lora_A.weight", "lora_B.weight", "diff"),
    "a magnitude alone": ("dora_scale",),
    "a bias of nothing": ("lora_B.bias",),
}


@pytest.mark.parametrize("roles", INCOMPLETE.values(), ids=INCOMPLETE)
def test_incomplete_modules(flux, tmp_path, roles):
    tensors = {f"{TO_Q}.{role}": torch.ones(4, 4) for role in roles}
    refused(flux, tmp_path, tensors, "incomplete|alone")


@pytest.mark.parametrize(
    ("role", "shape"),
    [
        ("lora_A.weight", (RANK, 7)),
        ("lora_A.weight", (RANK + 1, None)),
        ("lora_A.weight", (None,)),
        ("lora_A.weight", (RANK, None, 3, 3)),
        ("lora_B.weight", (7, RANK)),
        ("lora_B.bias", (7,)),
        ("diff_b", (7,)),
        ("alpha", (2,)),
        ("dora_scale", (7,)),
        ("dora_scale", (7, 1)),
        ("dora_scale", (1, 7)),
    ],
)
def test_shapes_must_fit_the_module(flux, tmp_path, role, shape):
    size = width(flux)
    tensors = lora(TO_Q, size, size)
    tensors[f"{TO_Q}.{role}"] = torch.ones([n or size for n in shape])
    refused(flux, tmp_path, tensors, "for another model")


@pytest.mark.parametrize("shapes", [((2, 2), (3, 3)), ((1, 1), (5, 5))])
def test_a_lokr_must_multiply_to_the_module(flux, tmp_path, shapes):
    tensors = {f"{TO_Q}.lokr_w{i + 1}": torch.ones(s) for i, s in enumerate(shapes)}
    refused(flux, tmp_path, tensors, "for another model")


def test_a_norm_takes_only_a_difference(flux, tmp_path):
    norm = "transformer.transformer_blocks.0.attn.norm_q"
    size = flux["transformer"].transformer_blocks[0].attn.norm_q.weight.shape[0]
    refused(flux, tmp_path, lora(norm, size, size), "for another model")
    bias = {f"{norm}.diff": torch.ones(size), f"{norm}.diff_b": torch.ones(size)}
    refused(flux, tmp_path, bias, "a bias, and that module has none")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_values_must_be_finite(flux, tmp_path, bad, dtype):
    tensors = {k: t.to(dtype) for k, t in lora(TO_Q, width(flux), width(flux)).items()}
    poisoned = tensors[f"{TO_Q}.lora_B.weight"].float()
    poisoned[-1, -1] = bad
    tensors[f"{TO_Q}.lora_B.weight"] = poisoned.to(dtype)
    refused(flux, tmp_path, tensors, "lora_B.weight' has values that are not finite")


def test_integers_are_refused(flux, tmp_path):
    tensors = {k: t.to(torch.int8) for k, t in lora(TO_Q, width(flux), width(flux)).items()}
    refused(flux, tmp_path, tensors, "I8; only floating point")


def test_an_alpha_without_factors_is_reported(flux, tmp_path):
    tensors = lora(TO_Q, width(flux), width(flux))
    tensors["lora_unet_final_layer_linear.alpha"] = torch.tensor(4.0)
    adapter = tiny.load(tmp_path / "a", flux, tensors)
    assert adapter.ignored == ("lora_unet_final_layer_linear.alpha",)


def test_what_tools_for_sliders_add_is_reported(flux, tmp_path):
    tensors = lora(TO_Q, width(flux), width(flux)) | {"_aux.0f1e2d": torch.ones(7, 2)}
    assert tiny.load(tmp_path / "a", flux, tensors).ignored == ("_aux.0f1e2d",)


def test_parts_that_flux_does_not_run_are_reported(flux, tmp_path):
    tensors = lora(TO_Q, width(flux), width(flux))
    extra = lora("lora_te1_text_projection", 4, 4)
    assert tiny.load(tmp_path / "a", flux, tensors | extra).ignored == tuple(sorted(extra))


def test_devs_guidance_embedder_is_ignored_by_schnell(tmp_path):
    schnell = tiny.modules(tiny.Size(1, 1, 2, (4, 6, 6), guidance=False))
    extra = lora("lora_unet_guidance_in_in_layer", 32, 256)
    tensors = lora(TO_Q, 32, 32) | extra
    assert tiny.load(tmp_path / "a", schnell, tensors).ignored == tuple(sorted(extra))


def test_size_is_bounded(flux, tmp_path, monkeypatch):
    monkeypatch.setattr(adapter_module, "MAX_TENSOR_BYTES", 100)
    refused(flux, tmp_path, lora(TO_Q, width(flux), width(flux)), "too many for an adapter")


def test_shapes_are_refused_before_anything_is_read(flux, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("opened")

    monkeypatch.setattr(adapter_module, "safe_open", never)
    refused(flux, tmp_path, lora(TO_Q, 5, 7), "for another model")


def test_the_adapter_does_not_depend_on_its_file(flux, tmp_path):
    tensors = lora(TO_Q, width(flux), width(flux))
    adapter = tiny.load(tmp_path / "a", flux, tensors)
    (tmp_path / "a").write_bytes(b"")
    [delta] = tiny.deltas(adapter, flux).values()
    torch.testing.assert_close(
        delta, tensors[f"{TO_Q}.lora_B.weight"] @ tensors[f"{TO_Q}.lora_A.weight"]
    )
