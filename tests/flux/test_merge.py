"""Reconciliation: exact restore, no drift, healing, order, and an untouched module tree."""

import copy
import random

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from flux.merge import UNKNOWN, WorkingWeights
from lora.adapter import Adapter
from tests import tiny

SIZE = tiny.SIZES[0]
WIDTH = SIZE.width
Q = "transformer_blocks.0.attn.to_q"


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=str)
def modules(request):
    return tiny.modules(SIZE, request.param)


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
    }


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, Adapter]:
    directory = tmp_path_factory.mktemp("adapters")
    found = tiny.modules(SIZE)
    return {
        name: tiny.load(directory / name, found, tensors, digest=name)
        for name, tensors in files().items()
    }


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
    pristine = copy.deepcopy(modules)
    weights = WorkingWeights(modules)
    weights.reconcile([(adapters["a"], 1.0)])
    first = state(modules)
    weights.reconcile([(adapters["a"], 0.4)])
    assert_bits(state(modules), fresh(pristine, [(adapters["a"], 0.4)]))
    key = ("transformer", f"{Q}.weight")
    assert not torch.equal(state(modules)[key], first[key])


def test_order_does_not_matter_to_the_bit(modules, adapters):
    pristine = copy.deepcopy(modules)
    a, b, d = adapters["a"], adapters["b"], adapters["d"]
    orders = [[(a, 0.7), (b, 0.3), (d, -1.2)], [(d, -1.2), (a, 0.7), (b, 0.3)]]
    assert_bits(fresh(pristine, orders[0]), fresh(pristine, orders[1]))
    thirds = [(a, 0.1), (a, 0.2), (a, 0.3)]
    assert_bits(fresh(pristine, thirds), fresh(pristine, thirds[::-1]))


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


@pytest.mark.parametrize("after", ["the same", "another", "nothing"])
def test_a_fault_at_any_parameter_heals_at_the_next_request(adapters, after):
    modules = tiny.modules(SIZE, torch.bfloat16)
    before = state(modules)
    first, second = [(adapters["a"], 1.0)], [(adapters["b"], 0.5), (adapters["d"], 0.5)]
    then = {"the same": second, "another": [(adapters["c"], 1.0)], "nothing": []}[after]
    expected = fresh(modules, then)
    # a's own are restored, b's and d's written
    writes = len(adapters["a"].parameters | adapters["b"].parameters | adapters["d"].parameters)
    for index in range(writes):
        store = Counted()
        weights = WorkingWeights(modules, store=store)
        weights.reconcile(first)
        store.fail_at = len(store.pointers) + index
        with pytest.raises(MemoryError, match="injected"):
            weights.reconcile(second)
        assert UNKNOWN in [weights.record(*key) for key in before]
        weights.reconcile(then)
        assert_bits(state(modules), expected)
        weights.reconcile([])
        assert_bits(state(modules), before)


class CancelledError(Exception):
    pass


def test_a_cancel_at_any_parameter_heals_at_the_next_request(modules, adapters):
    before = state(modules)
    desired = [(adapters["b"], 0.5), (adapters["d"], 0.5)]
    merged = fresh(modules, desired)
    writes = len(adapters["b"].parameters | adapters["d"].parameters)
    for index in range(writes):
        calls = iter(range(writes))

        def check(calls=calls, index=index):
            if next(calls) == index:
                raise CancelledError

        weights = WorkingWeights(modules)
        with pytest.raises(CancelledError):
            weights.reconcile(desired, check)
        assert sum(weights.record(*key) != () for key in before) == index
        if index % 2:
            assert weights.reconcile(desired).merged == writes - index
            assert_bits(state(modules), merged)
        weights.reconcile([])
        assert_bits(state(modules), before)


def test_a_failing_adapter_leaves_the_weights_alone_and_heals(modules, adapters):
    class Failing:
        digest, parameters = "e", adapters["a"].parameters

        def add_to(self, *_):
            raise RuntimeError("broken factors")

    before = state(modules)
    weights = WorkingWeights(modules)
    with pytest.raises(RuntimeError, match="broken"):
        weights.reconcile([(Failing(), 1.0)])
    assert_bits(state(modules), before)
    with pytest.raises(RuntimeError, match="half-written"):
        [weights.fingerprint(component) for component in modules]
    weights.reconcile([])
    assert weights.fingerprint("transformer") == ()


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


def test_a_source_of_pristine_values_and_a_store_can_be_given(adapters):
    """As quantised weights do it: finer pristine values, and a rounding of their own."""
    masters = tiny.modules(SIZE, torch.float32)
    modules = {name: copy.deepcopy(m).to(torch.bfloat16) for name, m in masters.items()}
    asked = []

    def pristine(component, name):
        asked.append((component, name))
        return masters[component].get_parameter(name).detach()

    def coarse(working, exact):
        working.copy_((exact.float() * 4).round() / 4)

    weights = WorkingWeights(modules, pristine, coarse)
    weights.reconcile([(adapters["a"], 1.0)])
    weight = masters["transformer"].get_parameter(f"{Q}.weight").detach()
    delta = tiny.deltas(adapters["a"], masters)["transformer", f"{Q}.weight"]
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


def inputs(batch=1, tokens=12, text=6):
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(batch, tokens, 16, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, 24, generator=generator),
        "pooled_projections": torch.randn(batch, 20, generator=generator),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.zeros(tokens, 3),
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    }


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def step(transformer):
    with torch.no_grad(), Operators() as seen:
        transformer(**inputs())
    return seen.names, [(name, type(module)) for name, module in transformer.named_modules()]


def test_a_step_is_the_same_operators_and_modules(adapters):
    modules = tiny.modules(SIZE)
    transformer = modules["transformer"]
    operators, tree = step(transformer)
    weights = WorkingWeights(modules)
    for names in ("a", "abcd", ""):
        weights.reconcile([(adapters[name], 0.5) for name in names])
        assert step(transformer) == (operators, tree)
    assert "aten.addmm.default" in operators


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, in inductor
def test_compiled_blocks_never_recompile(adapters):
    modules = tiny.modules(SIZE)
    transformer = modules["transformer"]
    uncompiled = copy.deepcopy(modules)
    counter = CompileCounterWithBackend("inductor")
    for block in (transformer.transformer_blocks[0], transformer.single_transformer_blocks[0]):
        block.compile(backend=counter)
    weights, reference = WorkingWeights(modules), WorkingWeights(uncompiled)
    with torch.no_grad():
        base = transformer(**inputs())[0].clone()
        frames = counter.frame_count
        assert frames == 2
        for names in ("a", "b", "c", "d", "ab", "cd", "abcd"):
            for each in (weights, reference):
                each.reconcile([(adapters[name], 0.5) for name in names])
            out = transformer(**inputs())[0]
            expected = uncompiled["transformer"](**inputs())[0]
            torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
            assert not torch.allclose(out, base, rtol=1e-3, atol=1e-3)
        weights.reconcile([])
        assert torch.equal(transformer(**inputs())[0], base)
    assert counter.frame_count == frames
