"""Reconciliation: one rounding, exact restore, no drift, order, and only what differs."""

import copy
import random

import pytest
import torch

from flux.transformers.merge import WorkingWeights
from tests.flux.merging import SIZE, Counted, Q, assert_bits, fresh, lora, state
from tests.support import tiny


def test_one_rounding_of_the_exact_sum(modules, adapters):
    before = state(modules)
    a, b = adapters["a"], adapters["b"]
    WorkingWeights(modules).reconcile([(a, 0.8), (b, -0.5)])
    after = state(modules)
    deltas = tiny.deltas(a, modules, 0.8)
    for key, delta in tiny.deltas(b, modules, -0.5).items():
        deltas[key] = deltas.get(key, 0) + delta
    for key, weight in before.items():
        exact = weight.double() + deltas.get(key, torch.zeros(())).double()
        eps = torch.finfo(weight.dtype).eps
        # half a step of the dtype, and what fp32 sums may lose
        limit = exact.abs() * eps / 2 + 2e-6
        assert ((after[key].double() - exact).abs() <= limit).all()
        assert torch.equal(after[key], weight) == (key not in deltas)


def test_hundreds_of_swaps_restore_every_bit_and_move_nothing(modules, adapters):
    before = state(modules)
    pointers = {k: p.data_ptr() for m in modules.values() for k, p in m.named_parameters()}
    weights = WorkingWeights(modules)
    rng = random.Random(0)
    for _ in range(300):
        chosen = rng.sample(sorted(adapters), rng.randint(0, 3))
        weights.reconcile([(adapters[name], rng.uniform(-2, 2)) for name in chosen])
    last = [(adapters["a"], 0.3), (adapters["d"], 1.1)]
    weights.reconcile(last)
    assert_bits(state(modules), fresh(copy_with(modules, before), last))
    weights.reconcile([])
    assert_bits(state(modules), before)
    after = {k: p.data_ptr() for m in modules.values() for k, p in m.named_parameters()}
    assert after == pointers


def copy_with(modules, values):
    found = copy.deepcopy(modules)
    for component, module in found.items():
        for name, parameter in module.named_parameters():
            parameter.data.copy_(values[component, name])
    return found


def test_another_scale_equals_a_fresh_load(modules, adapters):
    base = copy.deepcopy(modules)
    weights = WorkingWeights(modules)
    weights.reconcile([(adapters["a"], 1.0)])
    first = state(modules)
    weights.reconcile([(adapters["a"], 0.4)])
    assert_bits(state(modules), fresh(base, [(adapters["a"], 0.4)]))
    key = ("transformer", f"{Q}.weight")
    assert not torch.equal(state(modules)[key], first[key])


def test_order_does_not_matter_to_the_bit(modules, adapters):
    base = copy.deepcopy(modules)
    a, b, d = adapters["a"], adapters["b"], adapters["d"]
    orders = [[(a, 0.7), (b, 0.3), (d, -1.2)], [(d, -1.2), (a, 0.7), (b, 0.3)]]
    assert_bits(fresh(base, orders[0]), fresh(base, orders[1]))
    thirds = [(a, 0.1), (a, 0.2), (a, 0.3)]
    assert_bits(fresh(base, thirds), fresh(base, thirds[::-1]))
    weights = WorkingWeights(modules)
    weights.reconcile(thirds)
    assert weights.reconcile(thirds[::-1]).merged == 0


def test_duplicates_are_summed_and_zero_is_the_base(modules, adapters):
    before = state(modules)
    a = adapters["a"]
    assert_bits(fresh(modules, [(a, 0.25), (a, 0.5)]), fresh(modules, [(a, 0.75)]))
    assert_bits(fresh(modules, [(a, 0.0)]), before)
    assert_bits(fresh(modules, [(a, 1.5), (a, -1.5)]), before)
    assert_bits(fresh(modules, [(adapters["d"], 0.0)]), before)
    weights = WorkingWeights(modules)
    assert weights.reconcile([(a, 0.0)]).merged == 0


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_must_be_finite(modules, adapters, scale):
    with pytest.raises(ValueError, match="finite"):
        WorkingWeights(modules).reconcile([(adapters["a"], scale)])


def test_only_what_differs_is_written(modules, adapters):
    store = Counted()
    weights = WorkingWeights(modules, store=store)
    parameters = {
        (component, name): parameter.data_ptr()
        for component, module in modules.items()
        for name, parameter in module.named_parameters()
    }

    def written(desired):
        store.pointers.clear()
        swap = weights.reconcile(desired)
        assert swap.merged + swap.restored == len(store.pointers)
        return sorted(store.pointers)

    def touched(*names):
        keys = set().union(*(adapters[name].parameters for name in names))
        return sorted(parameters[key] for key in keys)

    a, b, c = (adapters[name] for name in "abc")
    assert written([(a, 1.0)]) == touched("a")
    assert written([(a, 1.0)]) == []
    assert written([(a, 1.0), (c, 0.5)]) == touched("c")
    assert written([(b, 1.0), (c, 0.5)]) == touched("a", "b")
    assert written([(b, 1.0), (c, 0.6)]) == touched("c")
    assert written([]) == touched("b", "c")
    assert written([]) == []


def test_fingerprints_tell_what_a_component_holds(modules, adapters):
    weights = WorkingWeights(modules)
    clean = weights.fingerprint("text_encoder")
    weights.reconcile([(adapters["a"], 1.0)])
    with_a = weights.fingerprint("text_encoder")
    weights.reconcile([(adapters["a"], 0.5)])
    weaker = weights.fingerprint("text_encoder")
    weights.reconcile([(adapters["b"], 1.0)])  # b leaves the text encoder alone
    assert weights.fingerprint("text_encoder") == clean
    assert len({clean, with_a, weaker}) == 3
    assert weights.record("transformer", f"{Q}.weight") == (("b", 1.0),)


def test_a_source_of_base_values_and_a_store_can_be_given(adapters):
    """As quantised weights do it: finer base values, and a rounding of their own."""
    base_weights = tiny.modules(SIZE, torch.float32)
    modules = {name: copy.deepcopy(m).to(torch.bfloat16) for name, m in base_weights.items()}
    asked = []

    def base(component, name):
        asked.append((component, name))
        return base_weights[component].get_parameter(name).detach()

    def coarse(working, exact):
        working.copy_((exact.float() * 4).round() / 4)

    weights = WorkingWeights(modules, base, coarse)
    weights.reconcile([(adapters["a"], 1.0)])
    weight = base_weights["transformer"].get_parameter(f"{Q}.weight").detach()
    delta = tiny.deltas(adapters["a"], base_weights)["transformer", f"{Q}.weight"]
    expected = (((weight + delta) * 4).round() / 4).to(torch.bfloat16)
    torch.testing.assert_close(modules["transformer"].get_parameter(f"{Q}.weight").data, expected)
    assert set(asked) == set(adapters["a"].parameters)


def test_devs_guidance_is_left_out_of_schnell(tmp_path):
    dev = tiny.modules(tiny.Size(1, 1, 2, (4, 6, 6)))
    schnell = tiny.modules(tiny.Size(1, 1, 2, (4, 6, 6), guidance=False))
    name = "time_text_embed.guidance_embedder.linear_2"
    tensors = lora(f"transformer.{name}", 32, 32, 4, 1) | lora(f"transformer.{Q}", 32, 32, 4, 1)
    adapter = tiny.load(tmp_path / "a", dev, tensors)
    swap = WorkingWeights(schnell).reconcile([(adapter, 1.0)])
    assert swap.merged == 1
    assert swap.absent == (("transformer", f"{name}.weight"),)
