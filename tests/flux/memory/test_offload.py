"""Weights that live on the host: the same bits, whatever is merged, and little on the device."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flux.memory.offload import OnHost, Placement, offload, offloaded
from flux.memory.residency import ORDER, BudgetError
from flux.transformers.float8 import storage
from flux.transformers.merge import WorkingWeights
from flux.transformers.pool import Transformers
from flux.transformers.skeleton import size
from tests.flux.merging import SIZE
from tests.flux.streams import Streams
from tests.support import tiny
from weights.serving.settings import SettingsError

CPU = torch.device("cpu")
DEV, DEV8, SCHNELL8, SCHNELL = ORDER


@pytest.fixture(params=["plain", "streams"])
def streams(request, monkeypatch) -> Streams | None:
    """Either as a CPU is offloaded to itself, or as CUDA is, with the CPU in its place."""
    return Streams(monkeypatch) if request.param == "streams" else None


@pytest.fixture
def base_weights() -> dict[str, nn.Module]:
    return tiny.transformers()


def make(base_weights, device: torch.device = CPU, **options: Any) -> Transformers:
    options = {"dynamic": False, "budget": None} | options
    return Transformers(tiny.opened(base_weights), device, **options)


class Apart(Placement):
    """Multiplies as offloaded transformers do, without their hooks."""

    joins = False


def step(found: Transformers, key, device: torch.device = CPU) -> Tensor:
    """One forward pass of a transformer."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "hidden_states": (1, 16, 16),
        "encoder_hidden_states": (1, 5, 24),
        "pooled_projections": (1, 20),
        "img_ids": (16, 3),
        "txt_ids": (5, 3),
    }
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    inputs["timestep"] = torch.tensor([0.5])
    if key.variant == "dev":
        inputs["guidance"] = torch.tensor([3.0])
    module = found.modules[key]
    with torch.no_grad():
        moved = {name: value.to(device) for name, value in inputs.items()}
        return module(**moved).sample.cpu()


@pytest.mark.parametrize("key", ORDER, ids="-".join)
def test_the_same_bits_with_and_without_adapters(base_weights, adapters, streams, key) -> None:
    here, there = (make(base_weights, placement=kind(CPU)) for kind in (Apart, OnHost))
    for desired in ([], [(adapters["a"], 1.0), (adapters["d"], 0.5)], [(adapters["c"], 1.5)], []):
        for found in (here, there):
            found.reconcile(key, desired)
        expected = step(here, key)
        for _ in range(3):  # the hooks learn the order of the layers in the first
            assert torch.equal(step(there, key), expected)


def test_products_that_the_library_refuses_are_computed_there_too(
    base_weights, make_library, streams
) -> None:
    here, there = (
        make(base_weights, dynamic=True, placement=kind(CPU)) for kind in (Apart, OnHost)
    )
    make_library(least=20)
    for transformers in (here, there):
        transformers.reconcile(DEV8, [])
    for _ in range(3):
        assert torch.equal(step(there, DEV8), step(here, DEV8))


def test_one_that_leaves_the_host_comes_back_whole(base_weights, adapters, streams) -> None:
    here = make(base_weights, placement=Apart(CPU))
    there = make(base_weights, placement=OnHost(CPU), budget=size(base_weights["dev"], frozenset()))
    expected = {}
    for found in (DEV, SCHNELL8):
        here.reconcile(found, [(adapters["b"], 1.0)])
        expected[found] = step(here, found)
    for found in (DEV, SCHNELL8) * 2:
        there.reconcile(found, [(adapters["b"], 1.0)])
        assert torch.equal(step(there, found), expected[found])
        assert torch.equal(step(there, found), expected[found])
        assert there.resident == (found,)


def test_one_that_leaves_gives_its_page_locked_memory_back(base_weights, monkeypatch) -> None:
    """At once: the next one takes as much, and the host has no room for both."""
    streams = Streams(monkeypatch)
    there = make(base_weights, placement=OnHost(CPU), budget=size(base_weights["dev"], frozenset()))
    gc.disable()
    try:
        for key, other in ((DEV, SCHNELL8), (SCHNELL8, DEV)):
            there.reconcile(key, [])
            for _ in range(2):
                step(there, key)
            held = [weakref.ref(t) for p in there.modules[key].parameters() for t in storage(p)]
            streams.locked.clear()
            there.reconcile(other, [])
            assert there.resident == (other,)
            assert [ref for ref in held if ref() is not None] == []
    finally:
        gc.enable()


def test_little_is_on_the_device_at_a_time(base_weights, monkeypatch) -> None:
    streams, there = Streams(monkeypatch), make(base_weights, placement=OnHost(CPU))
    there.reconcile(DEV, [])
    for _ in range(3):
        step(there, DEV)
        assert streams.on_device == {}
    sizes = [p.numel() * p.element_size() for p in base_weights["dev"].parameters()]
    assert 0 < streams.most <= 2.5 * max(sizes) < sum(sizes) / 4


class Full:
    """Lets a layer that adapter b changes run out of memory, once."""

    def __init__(self, module: nn.Module) -> None:
        layer = module.get_submodule("transformer_blocks.0.attn.to_k")
        self._handle = layer.register_forward_pre_hook(self._fail)

    def _fail(self, *_: object) -> None:
        self._handle.remove()
        raise torch.OutOfMemoryError("CUDA out of memory (pretended)")


@pytest.mark.parametrize("passes", [0, 2])
@pytest.mark.parametrize("key", [DEV, DEV8], ids="-".join)
def test_out_of_memory_in_a_layer(base_weights, adapters, streams, key, passes) -> None:
    """Layers that are on the device then are brought anew, with what was merged meanwhile."""
    here, there = (make(base_weights, placement=kind(CPU)) for kind in (Apart, OnHost))
    there.reconcile(SCHNELL8, [])
    there.reconcile(key, [])
    for _ in range(passes):
        step(there, key)
    for desired in ([], [(adapters["b"], 1.0)]):
        Full(there.modules[key])
        with pytest.raises(torch.OutOfMemoryError):
            step(there, key)
        for found in (here, there):
            found.reconcile(key, desired)
        assert torch.equal(step(there, key), step(here, key))
    Full(there.modules[key])
    work: Callable[[], Tensor] = lambda: step(there, key)  # noqa: E731
    assert torch.equal(there.with_room(key, work), step(here, key))
    assert set(there.resident) == {SCHNELL8, key}  # nobody else takes memory of the device


def test_a_host_too_small_says_so(base_weights) -> None:
    with pytest.raises(BudgetError, match=r"the host has .* raise FLUX_HOST_MEMORY_GB"):
        make(base_weights, placement=OnHost(CPU), budget=1000)


def test_t5_with_and_without_adapters(adapters, streams) -> None:
    found = {}
    for name in ("here", "there"):
        t5 = tiny.modules(SIZE)["text_encoder_2"]
        if name == "there":
            offload(t5, CPU)
        found[name] = t5, WorkingWeights({"text_encoder_2": t5})
    ids = torch.arange(7)[None]
    seen = []
    for desired in ([], [(adapters["c"], 1.0)], []):
        answers = []
        for t5, weights in found.values():
            weights.reconcile(desired)
            with torch.no_grad():
                answers += [t5(ids)[0], t5(ids)[0]]
        assert all(torch.equal(answer, answers[0]) for answer in answers)
        seen.append(answers[0])
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])


def test_a_device_without_streams_is_told() -> None:
    assert offloaded("none", torch.device("mps")) == frozenset()
    with pytest.raises(SettingsError, match="FLUX_OFFLOAD=all: mps cannot copy"):
        offloaded("all", torch.device("mps"))


@pytest.mark.gpu
@pytest.mark.parametrize("key", [DEV, DEV8], ids="-".join)
def test_on_a_gpu(base_weights, adapters, key) -> None:
    """The same as on the device; without streams and page-locked memory, nothing works here."""
    device = torch.device("cuda")
    here, there = make(base_weights, device), make(base_weights, device, placement=OnHost(device))
    for desired in ([], [(adapters["c"], 1.0)], []):
        for found in (here, there):
            found.reconcile(key, desired)
        for _ in range(3):
            generated, expected = step(there, key, device), step(here, key, device)
            # a merge may round otherwise on the host, and float8 then takes a neighbour
            torch.testing.assert_close(generated, expected, rtol=0.05, atol=0.05)
