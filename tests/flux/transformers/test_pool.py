"""Working transformers: one pass from the base weights, exact in both precisions."""

import copy
import random

import pytest
import torch
from torch import nn
from torchao.quantization import Float8WeightOnlyConfig, quantize_

from flux.memory.offload import Empty, OnDevice
from flux.memory.pinned import move_parameters
from flux.memory.residency import ORDER, BudgetError
from flux.transformers.merge import WorkingWeights
from flux.transformers.pool import Transformers
from flux.transformers.quantize import float8_parameters, storage
from flux.transformers.skeleton import size, skeleton
from tests.support import tiny

CPU = torch.device("cpu")
DEV, DEV8, SCHNELL8, SCHNELL = ORDER
SIZE = tiny.SIZES[0]
WIDTH = SIZE.width


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def base_weights(request) -> dict[str, nn.Module]:
    return tiny.transformers(request.param)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> list:
    directory = tmp_path_factory.mktemp("adapters")
    found = tiny.modules(SIZE)

    def lora(module: str, rows: int, columns: int, seed: int) -> dict[str, torch.Tensor]:
        down, up = tiny.factors(rows, columns, 4, seed)
        return {f"{module}.lora_A.weight": 0.1 * down, f"{module}.lora_B.weight": 0.1 * up}

    block = "double_blocks.0.img_attn"
    dora = {f"{block}.qkv.dora_scale": torch.full((1, WIDTH), 0.7)}
    bias = {f"{block}.proj.diff_b": torch.full((WIDTH,), 0.25)}
    files = [
        lora("single_blocks.1.linear1", 7 * WIDTH, WIDTH, 1) | lora("img_in", WIDTH, 16, 2),
        lora(f"{block}.qkv", 3 * WIDTH, WIDTH, 3) | dora | bias,
    ]
    return [
        tiny.load(directory / str(number), found, tensors, digest=str(number))
        for number, tensors in enumerate(files)
    ]


def make(base_weights, budget=None, dynamic=False) -> Transformers:
    return Transformers(tiny.opened(base_weights), CPU, dynamic=dynamic, budget=budget)


def bits(module: nn.Module) -> dict[str, list[torch.Tensor]]:
    return {
        name: [tensor.view(torch.uint8).clone() for tensor in storage(parameter)]
        for name, parameter in module.named_parameters()
    }


Bits = dict[str, list[torch.Tensor]]


def assert_same(one: Bits, other: Bits) -> None:
    assert one.keys() == other.keys()
    for name, tensors in one.items():
        assert all(torch.equal(x, y) for x, y in zip(tensors, other[name], strict=True)), name


def assert_bits(a: nn.Module, b: nn.Module) -> None:
    assert_same(bits(a), bits(b))


def on_device(transformers: Transformers) -> list[torch.Tensor]:
    """Everything that the working transformers hold memory for."""
    parameters = [p for module in transformers.modules.values() for p in module.parameters()]
    return [tensor for p in parameters for tensor in storage(p) if not tensor.is_meta]


def freshly_merged(base: nn.Module, desired, *, float8: bool) -> nn.Module:
    """Merged in fp32 by itself and quantized by torchao."""
    dtype = base.dtype
    exact = copy.deepcopy(base).float()
    WorkingWeights({"transformer": exact}).reconcile(desired)
    names = float8_parameters(base) if float8 else frozenset()
    quantize_(exact, Float8WeightOnlyConfig(), lambda _, name: f"{name}.weight" in names)
    for name, parameter in exact.named_parameters():
        if name not in names:
            parameter.data = parameter.data.to(dtype)
    return exact


@pytest.mark.parametrize("key", [DEV, DEV8, SCHNELL8, SCHNELL], ids="-".join)
def test_merged_and_quantized_once(base_weights, adapters, key) -> None:
    """Whatever was there before, to the bit what torchao makes of a freshly merged model."""
    one, two = adapters
    transformers = make(base_weights)
    for desired in ([(one, 0.8), (two, -0.5)], [], [(two, 1.5)], [(one, 0.01)], []):
        for each in ORDER if desired else (key,):
            transformers.reconcile(each, desired)
        expected = freshly_merged(base_weights[key.variant], desired, float8=key.precision == "fp8")
        assert_bits(transformers.modules[key], expected)


def test_swaps_move_no_storage_and_leave_the_base_alone(base_weights, adapters) -> None:
    before = {name: bits(base) for name, base in base_weights.items()}
    transformers = make(base_weights)
    for key in ORDER:
        transformers.reconcile(key, [])
    first = {key: bits(transformers.modules[key]) for key in ORDER}
    pointers = [tensor.data_ptr() for tensor in on_device(transformers)]
    rng = random.Random(0)
    for _ in range(40):
        desired = [(adapter, rng.uniform(-2, 2)) for adapter in rng.sample(adapters, 1)]
        transformers.reconcile(rng.choice(ORDER), desired)
    for key in ORDER:
        transformers.reconcile(key, [])
        assert_same(bits(transformers.modules[key]), first[key])
    assert pointers == [tensor.data_ptr() for tensor in on_device(transformers)]
    for name, base in base_weights.items():
        assert_same(bits(base), before[name])


def test_leaving_drops_weights_and_records_together(base_weights, adapters) -> None:
    whole = size(base_weights["dev"], frozenset())
    transformers = make(base_weights, budget=whole)
    transformers.reconcile(DEV, [(adapters[0], 1.0)])
    transformers.reconcile(SCHNELL8, [(adapters[1], 1.0)])
    assert transformers.resident == (SCHNELL8,)
    assert all(p.is_meta for p in transformers.modules[DEV].parameters())
    for desired in ([(adapters[0], 1.0)], []):
        transformers.reconcile(DEV, desired)
        expected = freshly_merged(base_weights["dev"], desired, float8=False)
        assert_bits(transformers.modules[DEV], expected)


class Watched(OnDevice):
    """A device that tells when memory is taken."""

    def __init__(self, events: list[str]) -> None:
        super().__init__(CPU)
        self._events = events

    def allocator(self) -> Empty:
        taken = super().allocator()
        self._events.append("allocate")
        return taken

    def leave(self, module: nn.Module) -> None:
        self._events.append("leave")


def test_memory_of_what_leaves_is_given_back_once_before_the_next_comes(
    base_weights, monkeypatch
) -> None:
    events: list[str] = []
    room = size(base_weights["dev"], frozenset())
    transformers = Transformers(
        tiny.opened(base_weights), CPU, dynamic=False, budget=room, placement=Watched(events)
    )
    monkeypatch.setattr("flux.transformers.pool.empty_cache", lambda _: events.append("give back"))
    for key in (DEV8, SCHNELL8):
        transformers.reconcile(key, [])
    events.clear()
    transformers.reconcile(DEV, [])
    assert transformers.resident == (DEV,)
    leaving = events.count("leave")
    assert leaving >= 1
    assert events == ["leave"] * leaving + ["give back", "allocate"]
    events.clear()
    transformers.reconcile(DEV, [])
    assert events == []


def test_the_least_recently_used_leaves(base_weights) -> None:
    transformers = make(base_weights, budget=2 * size(base_weights["dev"], frozenset()))
    for key in (DEV, SCHNELL, DEV):
        transformers.reconcile(key, [])
    transformers.reconcile(DEV8, [])
    assert transformers.resident == (DEV, DEV8)


@pytest.mark.parametrize("share", [1.0, 1.6, 2.2])
def test_memory_on_the_device_stays_in_the_budget(base_weights, adapters, share) -> None:
    budget = int(share * size(base_weights["dev"], frozenset()))
    transformers = make(base_weights, budget)
    for key in transformers.at_start:
        transformers.reconcile(key, [])
    rng = random.Random(1)
    for _ in range(20):
        key = rng.choice(ORDER)
        transformers.reconcile(key, [(adapters[0], 0.5)])
        held = on_device(transformers)
        assert sum(t.numel() * t.element_size() for t in held) <= budget
        assert not any(p.is_meta for p in transformers.modules[key].parameters())


class CancelledError(Exception):
    pass


def test_a_cancel_while_it_comes_heals_at_the_next_request(base_weights, adapters) -> None:
    for stop in range(0, 60, 7):
        transformers, calls = make(base_weights), iter(range(60))

        def check(calls=calls, stop=stop) -> None:
            if next(calls) == stop:
                raise CancelledError

        with pytest.raises(CancelledError):
            transformers.reconcile(DEV8, [(adapters[0], 1.0)], check)
        transformers.reconcile(DEV8, [(adapters[1], 1.0)])
        expected = freshly_merged(base_weights["dev"], [(adapters[1], 1.0)], float8=True)
        assert_bits(transformers.modules[DEV8], expected)


class Full:
    """Work that runs out of memory a number of times."""

    def __init__(self, times: int) -> None:
        self.times = times

    def __call__(self) -> str:
        self.times -= 1
        if self.times >= 0:
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
        return "done"


def test_out_of_memory_makes_the_others_leave_and_is_tried_once_more(base_weights) -> None:
    transformers = make(base_weights)
    for key in ORDER:
        transformers.reconcile(key, [])
    assert transformers.with_room(DEV8, Full(0)) == "done"
    assert len(transformers.resident) == 4
    assert transformers.with_room(DEV8, Full(1)) == "done"
    assert transformers.resident == (DEV8,)
    with pytest.raises(BudgetError, match="dev fp8 alone there: ask for a smaller image"):
        transformers.with_room(DEV8, Full(2))
    transformers.reconcile(SCHNELL, [])
    assert transformers.resident == (DEV8, SCHNELL)


def test_out_of_memory_while_the_first_adapters_come_is_recovered_from(
    base_weights, monkeypatch
) -> None:
    transformers, real = make(base_weights), WorkingWeights.reconcile
    full = Full(1)

    def reconcile(*arguments):
        full()
        return real(*arguments)

    monkeypatch.setattr(WorkingWeights, "reconcile", reconcile)
    transformers.reconcile(DEV8, [])
    rows = {entry.name: entry for entry in transformers.entries()}
    assert rows["dev fp8"].cost
    assert_bits(transformers.modules[DEV8], freshly_merged(base_weights["dev"], [], float8=True))


def test_out_of_memory_while_it_comes_leaves_nothing_half_there(base_weights, monkeypatch) -> None:
    transformers = make(base_weights)
    with monkeypatch.context() as patch:
        patch.setattr("flux.transformers.pool.empty_float8", lambda *_, **__: Full(1)())
        with pytest.raises(BudgetError, match="Out of memory"):
            transformers.reconcile(DEV8, [])
    assert transformers.resident == ()
    assert all(p.is_meta for p in transformers.modules[DEV8].parameters())
    transformers.reconcile(DEV8, [])
    assert_bits(transformers.modules[DEV8], freshly_merged(base_weights["dev"], [], float8=True))


def test_the_size_of_the_real_model() -> None:
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True).to(torch.bfloat16)
    assert round(size(model, frozenset()) / 1e9, 2) == 23.80
    assert round(size(model, float8_parameters(model)) / 1e9, 2) == 11.98


def test_declared_sizes_are_what_the_weights_take(base_weights) -> None:
    transformers = make(base_weights)
    for key in ORDER:
        transformers.reconcile(key, [])
        module = transformers.modules[key]
        taken = sum(t.numel() * t.element_size() for p in module.parameters() for t in storage(p))
        float8 = float8_parameters(module) if key.precision == "fp8" else frozenset()
        assert size(skeleton(base_weights[key.variant]), float8) == taken


@pytest.mark.gpu
def test_on_a_gpu(base_weights, adapters) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    device = torch.device("cuda")
    assert move_parameters(base_weights["dev"], pinned=True)
    transformers = Transformers(tiny.opened(base_weights), device, dynamic=False, budget=None)
    for key in ORDER:
        transformers.reconcile(key, [(adapters[1], 1.0)])
        transformers.reconcile(key, [])
        expected = freshly_merged(base_weights[key.variant], [], float8=key.precision == "fp8")
        assert_bits(transformers.modules[key].cpu(), expected)


@pytest.mark.gpu
def test_real_memory_of_a_gpu_that_runs_out(base_weights) -> None:
    """The first try asks for more than the card has, and the second for what it has."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    device = torch.device("cuda")
    transformers = Transformers(tiny.opened(base_weights), device, dynamic=False, budget=None)
    for key in ORDER:
        transformers.reconcile(key, [])
    _, total = torch.cuda.mem_get_info(device)
    sizes = iter([2 * total, 1024, 2 * total, 2 * total])

    def work() -> int:
        return torch.empty(next(sizes), dtype=torch.uint8, device=device).numel()

    assert transformers.with_room(DEV8, work) == 1024
    assert transformers.resident == (DEV8,)
    with pytest.raises(BudgetError, match="dev fp8 alone there"):
        transformers.with_room(DEV8, work)
    transformers.reconcile(SCHNELL, [])
    assert transformers.resident == (DEV8, SCHNELL)
