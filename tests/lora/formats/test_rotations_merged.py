"""Rotations and GLoRA like every other kind: scale, order of rows, bias, dtype and bad shapes."""

import pytest
import torch

from flux.transformers.merge import WorkingWeights
from tests.lora.adapters import (
    PROJ,
    QKV,
    QKV_PARTS,
    TO_OUT,
    TO_Q,
    cayley,
    dora,
    expect,
    load,
    random,
    refused,
    rotations,
    weights,
    width,
)
from tests.support import tiny

KINDS = tuple(rotations(4, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_in_another_order_are_put_back(flux, tmp_path, kind):
    """BFL's last modulation has the halves of its rows swapped: the whole difference swaps too."""
    name = "norm_out.linear.weight"
    [weight] = weights(flux, [name])
    tensors = rotations(*weight.shape)[kind]
    there = tiny.deltas(load(flux, tmp_path, "norm_out.linear", tensors), flux)
    swapped = torch.cat(weight.chunk(2)[::-1])
    modules = {**flux, "transformer": tiny.modules(size_of(flux))["transformer"]}
    modules["transformer"].norm_out.linear.weight.data.copy_(swapped)
    module = "lora_unet_final_layer_adaLN_modulation_1"
    found = tiny.deltas(load(flux, tmp_path, module, tensors), modules)
    expected = torch.cat(there["transformer", name].chunk(2)[::-1])
    tiny.assert_same(found, {("transformer", name): expected})


def size_of(flux):
    return next(size for size in tiny.SIZES if size.width == width(flux))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.5, -0.7, 3.0])
def test_the_scale_multiplies_the_finished_difference(flux, tmp_path, kind, scale):
    weight = torch.cat(weights(flux, QKV_PARTS))
    adapter = load(flux, tmp_path, QKV, rotations(*weight.shape)[kind])
    expected = {key: scale * delta for key, delta in tiny.deltas(adapter, flux).items()}
    tiny.assert_same(tiny.deltas(adapter, flux, scale), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_and_restored(flux, tmp_path, kind):
    """Weights of bf16 are rounded once; scale 0 is the base, and what is left, bit for bit."""
    modules = tiny.modules(size_of(flux), torch.bfloat16)
    before = {n: p.detach().clone() for n, p in modules["transformer"].named_parameters()}
    shape = torch.cat(weights(flux, QKV_PARTS)).shape
    adapter = load(flux, tmp_path, QKV, rotations(*shape)[kind])
    deltas = tiny.deltas(adapter, modules, 1.5)
    working = WorkingWeights(modules)
    assert working.reconcile([(adapter, 0.0)]).merged == 0
    assert working.reconcile([(adapter, 1.5)]).merged == 3
    for (_, name), delta in deltas.items():
        merged = modules["transformer"].get_parameter(name)
        torch.testing.assert_close(merged.float(), before[name] + delta, rtol=2**-8, atol=1e-6)
    assert working.reconcile([]).restored == 3
    after = dict(modules["transformer"].named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("kind", KINDS)
def test_biases_are_not_turned(flux, tmp_path, kind):
    """LyCORIS and PEFT turn the weight alone; a difference to the bias stands beside it."""
    weight = torch.cat(weights(flux, QKV_PARTS))
    tensors = rotations(*weight.shape)[kind]
    plain = tiny.deltas(load(flux, tmp_path, QKV, tensors), flux)
    assert {name for _, name in plain} == set(QKV_PARTS)
    bias = random(weight.shape[0])
    found = tiny.deltas(load(flux, tmp_path, QKV, tensors | {"diff_b": bias}), flux)
    biases = {("transformer", n.replace("weight", "bias")): b
              for n, b in zip(QKV_PARTS, bias.chunk(3), strict=True)}  # fmt: skip
    tiny.assert_same(found, plain | biases)


@pytest.mark.parametrize("kind", KINDS)
def test_a_magnitude_over_a_rotation(flux, tmp_path, kind):
    weight = torch.cat(weights(flux, QKV_PARTS))
    tensors = rotations(*weight.shape)[kind]
    plain = tiny.deltas(load(flux, tmp_path, QKV, tensors), flux)
    delta = torch.cat([plain["transformer", name] for name in QKV_PARTS]).double()
    magnitude = random(1, weight.shape[1]).abs()
    adapter = load(flux, tmp_path, QKV, tensors | {"dora_scale": magnitude})
    expect(flux, adapter, dora(weight, delta, magnitude), QKV_PARTS, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_stored_dtypes(flux, tmp_path, kind, dtype):
    module = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    shape = flux["text_encoder_2"].get_parameter(name).shape
    tensors = {role: t.to(dtype) for role, t in rotations(*shape)[kind].items()}
    found = tiny.deltas(load(flux, tmp_path, module, tensors), flux)
    exact = {role: t.float() for role, t in tensors.items()}
    expected = tiny.deltas(load(flux, tmp_path, module, exact), flux)
    assert found.keys() == {("text_encoder_2", name)}
    tiny.assert_same(found, expected)


def test_a_small_rotation_keeps_its_digits(flux, tmp_path):
    """R - I is computed, not R: a rotation by 1e-6 would have no digits left in R."""
    [weight] = weights(flux, [TO_OUT])
    size = weight.shape[0] // 4
    blocks = 1e-6 * random(4, size, size)
    adapter = load(flux, tmp_path, PROJ, {"oft_blocks": blocks})
    turned = torch.block_diag(*cayley(blocks)).T @ weight
    expect(flux, adapter, turned - weight, [TO_OUT])


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"oft_blocks": (4, 5, 5)}, "changes a weight of 20 x .* for another model"),
        ({"oft_blocks": (4, 8, 7)}, r"expected \[blocks, size, size\] of one OFT"),
        ({"oft_blocks": (4, 8)}, r"expected \[blocks, size, size\]"),
        ({"oft_blocks": (2, 4, 5, 5)}, "for another model"),
        ({"oft_blocks": (4, "size", "size"), "rescale": (3, 1)}, "rescale' .* for another model"),
        ({"oft_blocks": (4, "size", "size"), "rescale": ("rows", 2)}, "for another model"),
        ({"oft_blocks": (9, 4, "size", "size")}, "for another model"),
        ({"rescale": ("rows", 1)}, "incomplete"),
        ({"oft_R.weight": (4, 5)}, "for another model"),
        ({"oft_R.weight": (5, 6)}, "for another model"),
        ({"oft_R.weight": (1, 21)}, "for another model"),
        ({"oft_R.scaled_oft": ()}, "alone"),
        ({"oft_R.weight": (2, 6), "oft_R.scaled_oft": (2,)}, "for another model"),
        ({"diff": ("rows", "rows"), "oft_R.scaled_oft": ()}, "a rotation that the file lacks"),
        (
            {"oft_blocks": (4, "size", "size"), "lora_B.bias": ("rows",)},
            "lora_B.bias' is the bias of a LoRA's up, which the file lacks",
        ),
        ({"oft_R.weight": (2, 6), "oft_blocks": (4, "size", "size")}, "two kinds"),
        ({"a1.weight": ("rows", 2), "a2.weight": (2, "rows")}, "incomplete"),
        (
            {
                "a1.weight": ("rows", 2),
                "a2.weight": (2, "rows"),
                "b1.weight": (2, "rows"),
                "b2.weight": ("rows", 2),
            },
            "for another model",
        ),
    ],
)
def test_shapes_must_fit_the_module(flux, tmp_path, tensors, match):
    numbers = {"rows": width(flux), "size": width(flux) // 4}
    made = {
        f"{TO_Q}.{role}": torch.ones([numbers.get(n, n) for n in shape])
        for role, shape in tensors.items()
    }
    refused(flux, tmp_path, made, match)


@pytest.mark.parametrize("kind", KINDS)
def test_a_norm_has_no_rotation(flux, tmp_path, kind):
    norm = flux["transformer"].transformer_blocks[0].attn.norm_q.weight
    tensors = rotations(len(norm), len(norm))[kind]
    module = "transformer.transformer_blocks.0.attn.norm_q"
    refused(flux, tmp_path, {f"{module}.{r}": t for r, t in tensors.items()}, "for another model")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e9, 1e200])
def test_rotations_too_large_to_compute_are_refused(flux, tmp_path, kind, size):
    found = rotations(width(flux), width(flux))[kind]
    tensors = {f"{TO_Q}.{role}": size * t.double() for role, t in found.items()}
    refused(flux, tmp_path, tensors, "would overflow")
