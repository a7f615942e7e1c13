"""Rows 18 to 23: kinds of delta other than a plain LoRA, against float64 formulas."""

import pytest
import torch

from lora.formats.errors import AdapterError
from tests.lora.adapters import FUSED, FUSED_PARTS, TO_Q, dora, expect, load, random, weights
from tests.support import tiny

ALPHA, RANK = 3.0, 2


def lokr_tensors(rows, columns, how1, how2):
    """Tensors of a LoKr and its (w1, w2) in float64; heights chosen to straddle q, k, v, mlp."""
    rows1, columns1 = 4, 2
    rows2, columns2 = rows // rows1, columns // columns1
    tensors = {}
    if how1 == "whole":
        tensors["lokr_w1"] = random(rows1, columns1)
        w1 = tensors["lokr_w1"].double()
    else:
        tensors["lokr_w1_a"], tensors["lokr_w1_b"] = random(rows1, RANK), random(RANK, columns1)
        w1 = tensors["lokr_w1_a"].double() @ tensors["lokr_w1_b"].double()
    if how2 == "whole":
        tensors["lokr_w2"] = random(rows2, columns2)
        w2 = tensors["lokr_w2"].double()
    elif how2 == "product":
        tensors["lokr_w2_a"], tensors["lokr_w2_b"] = random(rows2, RANK), random(RANK, columns2)
        w2 = tensors["lokr_w2_a"].double() @ tensors["lokr_w2_b"].double()
    else:
        a, b, core = random(RANK, rows2), random(RANK, columns2), random(RANK, RANK, 1, 1)
        tensors |= {"lokr_w2_a": a, "lokr_w2_b": b, "lokr_t2": core}
        w2 = torch.einsum("ijkl,ip,jr->prkl", core.double(), a.double(), b.double())[..., 0, 0]
    return tensors, w1, w2


@pytest.mark.parametrize("how1", ["whole", "product"])
@pytest.mark.parametrize("how2", ["whole", "product", "tucker"])
def test_row_18_lokr(flux, tmp_path, how1, how2):
    rows = sum(weight.shape[0] for weight in weights(flux, FUSED_PARTS))
    tensors, w1, w2 = lokr_tensors(rows, weights(flux, FUSED_PARTS)[0].shape[1], how1, how2)
    tensors["alpha"] = torch.tensor(ALPHA)
    adapter = tiny.load(tmp_path / "a", flux, {f"{FUSED}.{k}": v for k, v in tensors.items()})
    scaling = 1.0 if (how1, how2) == ("whole", "whole") else ALPHA / RANK
    expect(flux, adapter, scaling * torch.kron(w1, w2))
    assert adapter.format == "kohya keys, BFL names, LoKr"


def test_row_18_lokr_of_lycoris_under_diffusers_names(flux, tmp_path):
    name = "transformer_blocks.0.attn.to_q.weight"
    [weight] = weights(flux, [name])
    tensors, w1, w2 = lokr_tensors(*weight.shape, "whole", "whole")
    tensors["alpha"] = torch.tensor(float("inf"))  # placeholder that means nothing here
    prefix = "lycoris_transformer_blocks_0_attn_to_q"
    adapter = tiny.load(tmp_path / "a", flux, {f"{prefix}.{k}": v for k, v in tensors.items()})
    expect(flux, adapter, torch.kron(w1, w2), [name])


def test_row_19_loha(flux, tmp_path):
    rows, columns = (
        sum(w.shape[0] for w in weights(flux, FUSED_PARTS)),
        weights(flux, FUSED_PARTS)[0].shape[1],
    )
    a1, b1, a2, b2 = (
        random(*shape, seed=i) for i, shape in enumerate([(rows, RANK), (RANK, columns)] * 2)
    )
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    tensors = {f"{FUSED}.{n}": t for n, t in zip(names, (a1, b1, a2, b2), strict=True)}
    tensors[f"{FUSED}.alpha"] = torch.tensor(ALPHA)
    adapter = tiny.load(tmp_path / "a", flux, tensors)
    dense = (a1.double() @ b1.double()) * (a2.double() @ b2.double()) * ALPHA / RANK
    expect(flux, adapter, dense)


DORA = [
    ("lora_unet_double_blocks_0_img_attn_qkv.dora_scale", "row"),
    ("lora_unet_double_blocks_0_img_attn_qkv.dora_scale", "column"),
    ("double_blocks.0.img_attn.qkv.lora_magnitude_vector", "vector"),
    ("base_model.model.double_blocks.0.img_attn.qkv.lora_magnitude_vector.weight", "vector"),
    ("base_model.model.double_blocks.0.img_attn.qkv.lora_magnitude_vector.default.weight", "row"),
    ("diffusion_model.double_blocks.0.img_attn.qkv.magnitude", "vector"),
]


@pytest.mark.parametrize(("key", "axis"), DORA)
@pytest.mark.parametrize("scale", [1.0, 0.5, -0.7])
def test_row_20_dora_scales_the_finished_difference(flux, tmp_path, key, axis, scale):
    names = [f"transformer_blocks.0.attn.to_{x}.weight" for x in "qkv"]
    weight = torch.cat(weights(flux, names))
    rows, columns = weight.shape
    down, up = tiny.factors(rows, columns, RANK)
    magnitude = {
        "row": random(rows, 1).abs(),
        "column": random(1, columns).abs(),
        "vector": random(rows).abs(),
    }[axis]
    module = key[: key.index("qkv") + 3]
    tensors = {
        f"{module}.lora_down.weight": down,
        f"{module}.lora_up.weight": up,
        f"{module}.alpha": torch.tensor(ALPHA),
        key: magnitude,
    }
    adapter = tiny.load(tmp_path / "a", flux, tensors)
    m = magnitude.unsqueeze(1) if axis == "vector" else magnitude
    dense = scale * dora(weight, ALPHA / RANK * up.double() @ down.double(), m)
    actual = tiny.deltas(adapter, flux, scale)
    cut = dense.chunk(3)
    expected = {("transformer", n): d for n, d in zip(names, cut, strict=True)}
    tiny.assert_same(actual, expected)
    assert adapter.format.endswith("DoRA")


@pytest.mark.parametrize("axis", [0, 1])
def test_row_20_dora_of_a_row_or_column_that_comes_to_nothing(flux, tmp_path, axis):
    """It stays 0: there is no direction that the magnitude, above 4 here, could have."""
    name = "transformer_blocks.0.attn.to_q.weight"
    weight = flux["transformer"].get_parameter(name).detach()
    first = torch.eye(len(weight))[:1]
    down, up = (weight[:1], -first.T) if axis == 0 else (-first, weight[:, :1])
    shape = (len(weight), 1) if axis == 0 else (1, len(weight))
    tensors = {"lora_A.weight": down, "lora_B.weight": up.contiguous()}
    tensors["dora_scale"] = torch.full(shape, 100.0)
    adapter = load(flux, tmp_path, TO_Q, tensors)
    [delta] = tiny.deltas(adapter, flux).values()
    assert (weight + delta).select(axis, 0).abs().max() == 0
    assert torch.isfinite(delta).all()


def test_row_20_dora_on_the_modulation_keeps_its_rows_together(flux, tmp_path):
    """The magnitude's rows are in BFL's order, like those of `up`."""
    names = ["norm_out.linear.weight"]
    [weight] = weights(flux, names)
    rows, columns = weight.shape
    down, up = tiny.factors(rows, columns, RANK)
    magnitude = random(rows, 1).abs()
    module = "lora_unet_final_layer_adaLN_modulation_1"
    tensors = {
        f"{module}.lora_down.weight": down,
        f"{module}.lora_up.weight": up,
        f"{module}.dora_scale": magnitude,
    }
    adapter = tiny.load(tmp_path / "a", flux, tensors)
    in_bfl_order = torch.cat(weight.chunk(2)[::-1])
    dense = dora(in_bfl_order, up.double() @ down.double(), magnitude)
    expect(flux, adapter, torch.cat(dense.chunk(2)[::-1]), names)


def test_row_20_dora_over_another_kind(flux, tmp_path):
    name = "transformer_blocks.0.attn.to_q.weight"
    [weight] = weights(flux, [name])
    tensors, w1, w2 = lokr_tensors(*weight.shape, "whole", "whole")
    tensors["dora_scale"] = random(1, weight.shape[1]).abs()
    prefix = "lycoris_transformer_blocks_0_attn_to_q"
    adapter = tiny.load(tmp_path / "a", flux, {f"{prefix}.{k}": v for k, v in tensors.items()})
    expect(flux, adapter, dora(weight, torch.kron(w1, w2), tensors["dora_scale"]), [name])


def test_row_21_full_differences_of_weights_biases_and_norms(flux, tmp_path):
    block = "transformer_blocks.0."
    names = {
        "lora_unet_double_blocks_0_img_attn_proj.diff": block + "attn.to_out.0.weight",
        "lora_unet_double_blocks_0_img_attn_proj.diff_b": block + "attn.to_out.0.bias",
        "lora_unet_double_blocks_0_img_attn_norm_query_norm.diff": block + "attn.norm_q.weight",
        "double_blocks.0.txt_attn.norm.key_norm.scale.diff": block + "attn.norm_added_k.weight",
        "transformer.transformer_blocks.0.attn.norm_k.w_norm": block + "attn.norm_k.weight",
    }
    parameters = dict(flux["transformer"].named_parameters())
    tensors = {key: random(*parameters[name].shape) for key, name in names.items()}
    adapter = tiny.load(tmp_path / "a", flux, tensors)
    expected = {("transformer", name): -2 * tensors[key] for key, name in names.items()}
    tiny.assert_same(tiny.deltas(adapter, flux, -2.0), expected)


def test_row_21_layer_norms_of_the_text_encoder(flux, tmp_path):
    size = flux["text_encoder"].final_layer_norm.weight.shape[0]
    module = "lora_te1_text_model_encoder_layers_0_layer_norm1"
    tensors = {f"{module}.w_norm": random(size), f"{module}.b_norm": random(size, seed=1)}
    adapter = tiny.load(tmp_path / "a", flux, tensors)
    name = "encoder.layers.0.layer_norm1"
    expected = {
        ("text_encoder", f"{name}.weight"): tensors[f"{module}.w_norm"],
        ("text_encoder", f"{name}.bias"): tensors[f"{module}.b_norm"],
    }
    tiny.assert_same(tiny.deltas(adapter, flux), expected)


def test_row_22_the_bias_of_up_takes_the_same_scaling(flux, tmp_path):
    """PEFT: with lora_bias, up's bias is multiplied by alpha / rank like up itself."""
    module, rows = "double_blocks.0.img_attn.qkv", 3 * weights(flux, FUSED_PARTS)[0].shape[0]
    down, up = tiny.factors(rows, weights(flux, FUSED_PARTS)[0].shape[1], RANK)
    bias = random(rows)
    tensors = {
        f"{module}.lora_A.weight": down,
        f"{module}.lora_B.weight": up,
        f"{module}.lora_B.bias": bias,
        f"{module}.alpha": torch.tensor(ALPHA),
    }
    adapter = tiny.load(tmp_path / "a", flux, tensors)
    scaling, expected = ALPHA / RANK, {}
    dense = scaling * up.double() @ down.double()
    for i, x in enumerate("qkv"):
        name = f"transformer_blocks.0.attn.to_{x}"
        expected["transformer", f"{name}.weight"] = dense.chunk(3)[i]
        expected["transformer", f"{name}.bias"] = scaling * bias.chunk(3)[i]
    tiny.assert_same(tiny.deltas(adapter, flux), expected)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    ],
)
def test_row_23_stored_dtypes_are_kept_and_computed_in_fp32(flux, tmp_path, dtype):
    size = weights(flux, FUSED_PARTS)[0].shape[0]
    module = "lora_unet_double_blocks_0_img_attn_proj"
    down, up = tiny.factors(size, size, RANK, dtype=dtype)
    tensors = {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
    tensors[f"{module}.alpha"] = torch.tensor(ALPHA).to(dtype)
    adapter = tiny.load(tmp_path / "a", flux, tensors)
    dense = ALPHA / RANK * up.double() @ down.double()
    expect(flux, adapter, dense, ["transformer_blocks.0.attn.to_out.0.weight"])
    assert adapter.nbytes == (2 * size * RANK + 1) * dtype.itemsize


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("lora_unet_double_blocks_0_img_attn_proj", "transformer_blocks.0.attn.to_out.0.weight"),
        ("lora_unet_img_in", "x_embedder.weight"),
    ],
)
def test_linears_stored_as_convolutions(flux, tmp_path, module, name):
    [weight] = weights(flux, [name])
    down, up = tiny.factors(*weight.shape, RANK)
    tensors = {
        f"{module}.lora_down.weight": down[..., None, None],
        f"{module}.lora_up.weight": up[..., None, None],
    }
    adapter = tiny.load(tmp_path / "a", flux, tensors)
    expect(flux, adapter, up.double() @ down.double(), [name])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0, -4.0])
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_alpha_must_be_finite_and_positive(flux, tmp_path, bad, kind):
    size = weights(flux, FUSED_PARTS)[0].shape[0]
    down, up = tiny.factors(size, size, RANK)
    tensors = {
        "lora": {"lora_down.weight": down, "lora_up.weight": up},
        "loha": {"hada_w1_a": up, "hada_w1_b": down, "hada_w2_a": up, "hada_w2_b": down},
        "lokr": {"lokr_w1": torch.ones(1, 1), "lokr_w2_a": up, "lokr_w2_b": down},
    }[kind]
    module = "lora_unet_double_blocks_0_img_attn_proj"
    tensors = {f"{module}.{role}": tensor for role, tensor in tensors.items()}
    tensors[f"{module}.alpha"] = torch.tensor(bad)
    with pytest.raises(AdapterError, match=r"alpha' is .* finite number above 0"):
        tiny.load(tmp_path / "a", flux, tensors)
