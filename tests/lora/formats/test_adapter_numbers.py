"""Modules of rank 0, products that overflow, and single numbers that trainers leave in a file."""

import json

import pytest
import torch

from flux.transformers.merge import WorkingWeights
from lora.formats.errors import AdapterError
from tests.lora.adapters import TO_Q, lora, width
from tests.support import tiny

TO_K = "transformer.transformer_blocks.0.attn.to_k"
Q = ("transformer", "transformer_blocks.0.attn.to_q.weight")
K_BIAS = ("transformer", "transformer_blocks.0.attn.to_k.bias")
BIG = 1e25


def product(tensors, module):
    return tensors[f"{module}.lora_B.weight"].double() @ tensors[f"{module}.lora_A.weight"].double()


@pytest.mark.parametrize("name", ["step", "epoch", "iteration", "global_step"])
@pytest.mark.parametrize("value", [torch.tensor(7), torch.tensor([7.0]), torch.ones(1, 1)])
def test_numbers_of_a_trainer_are_ignored_and_reported(flux, tmp_path, name, value):
    adapter = tiny.load(tmp_path / "a", flux, lora(TO_Q, width(flux), width(flux)) | {name: value})
    assert adapter.ignored == (name,)
    assert adapter.modules == 1


def test_such_a_name_with_many_values_is_not_ignored(flux, tmp_path):
    with pytest.raises(AdapterError, match=r"1 of 3 keys are unknown .*'step'"):
        tiny.load(
            tmp_path / "a", flux, lora(TO_Q, width(flux), width(flux)) | {"step": torch.ones(2)}
        )


def pruned(kind, size):
    return {
        "lora": {"lora_A.weight": torch.ones(0, size), "lora_B.weight": torch.ones(size, 0)},
        "loha": {
            "hada_w1_a": torch.ones(size, 0),
            "hada_w1_b": torch.ones(0, size),
            "hada_w2_a": torch.ones(size, 0),
            "hada_w2_b": torch.ones(0, size),
        },
        "lokr": {
            "lokr_w1": torch.ones(1, 1),
            "lokr_w2_a": torch.ones(size, 0),
            "lokr_w2_b": torch.ones(0, size),
        },
    }[kind]


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
@pytest.mark.parametrize("alpha", [None, 0.0, 4.0])
def test_modules_of_rank_0_are_reported(flux, tmp_path, kind, alpha):
    good = lora(TO_Q, width(flux), width(flux))
    empty = {f"{TO_K}.{role}": tensor for role, tensor in pruned(kind, width(flux)).items()}
    if alpha is not None:
        empty[f"{TO_K}.alpha"] = torch.tensor(alpha)
    adapter = tiny.load(tmp_path / "a", flux, good | empty)
    assert adapter.ignored == (f"{TO_K} (rank 0)",)
    assert adapter.modules == 1
    tiny.assert_same(tiny.deltas(adapter, flux), {Q: product(good, TO_Q)})


def test_what_stands_beside_rank_0_is_applied(flux, tmp_path):
    """A bias difference; and a magnitude, whose DoRA of no difference is not the base."""
    size = width(flux)
    nothing = pruned("lora", size)
    bias, magnitude = torch.ones(size), torch.full((size, 1), 0.5)
    tensors = {f"{m}.{role}": t for m in (TO_Q, TO_K) for role, t in nothing.items()}
    tensors |= {f"{TO_K}.diff_b": bias, f"{TO_Q}.dora_scale": magnitude}
    adapter = tiny.load(tmp_path / "a", flux, tensors)
    found = tiny.deltas(adapter, flux)
    weight = flux[Q[0]].get_parameter(Q[1]).detach().double()
    torch.testing.assert_close(found[K_BIAS], bias)
    expected = 0.5 * weight / weight.norm(dim=1, keepdim=True) - weight
    torch.testing.assert_close(found[Q].double(), expected, rtol=1e-5, atol=1e-6)
    assert adapter.ignored == ()


def test_a_file_of_rank_0_alone_is_refused(flux, tmp_path):
    tensors = {f"{TO_K}.{role}": tensor for role, tensor in pruned("lora", width(flux)).items()}
    with pytest.raises(AdapterError, match=r"each of its 1 modules has rank 0, e\.g\. .*to_k"):
        tiny.load(tmp_path / "a", flux, tensors)


def test_a_header_with_rank_0_is_refused(flux, tmp_path):
    """As PEFT refuses it: "`r` should be a positive integer value"."""
    settings = {"transformer.r": 0, "transformer.lora_alpha": 8}
    metadata = {"lora_adapter_metadata": json.dumps(settings)}
    with pytest.raises(AdapterError, match=r"rank \(r\) of the transformer's adapter is 0"):
        tiny.load(tmp_path / "a", flux, lora(TO_Q, width(flux), width(flux)), metadata)
    settings["transformer.r"] = 4
    metadata = {"lora_adapter_metadata": json.dumps(settings)}
    tensors = lora(TO_Q, width(flux), width(flux))
    adapter = tiny.load(tmp_path / "a", flux, tensors, metadata)
    tiny.assert_same(tiny.deltas(adapter, flux), {Q: 2 * product(tensors, TO_Q)})


def overflowing(size):
    small, big = torch.ones(2, size), torch.full((2, size), BIG)
    one = torch.ones(1, 1)
    return {
        "LoRA": {"lora_A.weight": big, "lora_B.weight": big.T},
        "one factor": {"lora_A.weight": small / BIG, "lora_B.weight": big.T},
        "alpha": {"lora_A.weight": small, "lora_B.weight": small.T, "alpha": torch.tensor(BIG)},
        "bias of up": {
            "lora_A.weight": small,
            "lora_B.weight": small.T,
            "lora_B.bias": torch.full((size,), BIG),
        },
        "LoHa": {"hada_w1_a": big.T, "hada_w1_b": big, "hada_w2_a": small.T, "hada_w2_b": small},
        "LoHa of two ranks": {  # below the limit with either of them
            name: values.T if name.endswith("a") else values
            for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
            for values in [torch.full((4, size), 3e3)]
        },
        "LoKr": {"lokr_w1": one * 1e10, "lokr_w2": torch.full((size, size), 1e10)},
        "factored LoKr": {
            "lokr_w1": one,
            "lokr_w2_a": torch.full((2, size), 1e6),
            "lokr_w2_b": torch.full((2, size), 1e6),
            "lokr_t2": torch.full((2, 2), 1e6),
        },
        "difference": {"diff": torch.full((size, size), 1e38)},
        "bias": {"diff_b": torch.full((size,), 1e38)},
        "magnitude": {
            "lora_A.weight": small,
            "lora_B.weight": small.T,
            "dora_scale": torch.full((size, 1), BIG),
        },
        "float64": {"diff": torch.full((size, size), 1e300, dtype=torch.float64)},
    }


@pytest.mark.parametrize("kind", overflowing(1))
def test_products_that_overflow_are_refused(flux, tmp_path, kind):
    tensors = {f"{TO_Q}.{role}": t for role, t in overflowing(width(flux))[kind].items()}
    with pytest.raises(AdapterError, match=r"to_q' has values that come to .* would overflow"):
        tiny.load(tmp_path / "a", flux, tensors)


@pytest.mark.parametrize("alpha", [1e17, 1e300])
def test_a_strength_in_the_header_that_overflows_whole_matrices_is_refused(flux, tmp_path, alpha):
    whole = {"lokr_w1": torch.full((1, 1), 0.1), "lokr_w2": torch.full((width(flux),) * 2, 0.1)}
    tensors = {f"{TO_Q}.{role}": t for role, t in whole.items()}
    settings = {"transformer.alpha": alpha, "transformer.r": 1}
    with pytest.raises(AdapterError, match=r"to_q' has values that come to .* would overflow"):
        tiny.load(tmp_path / "a", flux, tensors, {"lora_adapter_metadata": json.dumps(settings)})


@pytest.mark.parametrize(
    ("alpha", "rank"),
    [(10**400, 1), (0.5, 10**400), (float("nan"), 1)],
    ids=["alpha of 401 digits", "rank of 401 digits", "NaN"],
)
def test_a_strength_in_the_header_that_is_no_number_is_refused(flux, tmp_path, alpha, rank):
    size = width(flux)
    tensors = {f"{TO_Q}.lokr_w1": torch.ones(1, 1), f"{TO_Q}.lokr_w2": torch.ones(size, size)}
    metadata = {"lora_adapter_metadata": json.dumps({"alpha": alpha, "r": rank})}
    with pytest.raises(AdapterError, match=r"lora_alpha and rank of .* must be finite"):
        tiny.load(tmp_path / "a", flux, tensors, metadata)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_largest_values_of_fp16_are_not_too_many(flux, tmp_path, kind):
    """65504 in each factor, and the highest scale with go_fast: every weight stays finite."""
    size = width(flux)
    largest = torch.full((4, size), torch.finfo(torch.float16).max, dtype=torch.float16)
    tensors = {f"{TO_Q}.lora_A.weight": largest, f"{TO_Q}.lora_B.weight": largest.T}
    if kind == "dora":
        tensors[f"{TO_Q}.dora_scale"] = largest[:1]
    adapter = tiny.load(tmp_path / "a", flux, tensors)
    modules = tiny.modules(tiny.SIZES[0] if size == tiny.SIZES[0].width else tiny.SIZES[1])
    WorkingWeights(modules).reconcile([(adapter, 4.5)])
    merged = modules[Q[0]].get_parameter(Q[1])
    assert torch.isfinite(merged).all()
    assert merged.abs().max() > 1e4
