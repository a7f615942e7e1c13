"""Working transformers that share a device's memory: who leaves, and what a lack of it costs."""

import random

import pytest
import torch
from torch import nn

from flux.memory.offload import Empty, Placement
from flux.memory.residency import ORDER, BudgetError
from flux.transformers.float8 import float8_parameters, storage
from flux.transformers.merge import WorkingWeights
from flux.transformers.pool import Transformers
from flux.transformers.skeleton import size, skeleton
from tests.flux.pools import (
    CPU,
    DEV,
    DEV8,
    SCHNELL,
    SCHNELL8,
    assert_bits,
    freshly_merged,
    make,
    on_device,
)
from tests.support import tiny


def test_leaving_drops_weights_and_records_together(base_weights, pair) -> None:
    whole = size(base_weights["dev"], frozenset())
    transformers = make(base_weights, budget=whole)
    transformers.reconcile(DEV, [(pair[0], 1.0)])
    transformers.reconcile(SCHNELL8, [(pair[1], 1.0)])
    assert transformers.resident == (SCHNELL8,)
    assert all(p.is_meta for p in transformers.modules[DEV].parameters())
    for desired in ([(pair[0], 1.0)], []):
        transformers.reconcile(DEV, desired)
        expected = freshly_merged(base_weights["dev"], desired, float8=False)
        assert_bits(transformers.modules[DEV], expected)


class Watched(Placement):
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
def test_memory_on_the_device_stays_in_the_budget(base_weights, pair, share) -> None:
    budget = int(share * size(base_weights["dev"], frozenset()))
    transformers = make(base_weights, budget)
    for key in transformers.at_start:
        transformers.reconcile(key, [])
    rng = random.Random(1)
    for _ in range(20):
        key = rng.choice(ORDER)
        transformers.reconcile(key, [(pair[0], 0.5)])
        held = on_device(transformers)
        assert sum(t.numel() * t.element_size() for t in held) <= budget
        assert not any(p.is_meta for p in transformers.modules[key].parameters())


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


def test_out_of_memory_while_the_first_pair_come_is_recovered_from(
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
def test_real_memory_of_a_gpu_that_runs_out(base_weights) -> None:
    """The first try asks for more than the card has, and the second for what it has."""
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
