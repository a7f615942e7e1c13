"""Base weights on the device too: what a swap reads, and that they never stand in the way."""

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flux.memory.offload import Placement
from flux.memory.residency import ORDER, BaseCopy
from flux.transformers.base_weights import BaseWeights
from flux.transformers.float8 import float8_parameters, storage
from flux.transformers.merge import WorkingWeights
from flux.transformers.pool import Transformers
from flux.transformers.skeleton import size
from flux.variants import Key
from tests.flux import pools
from tests.flux.streams import Late
from tests.support import tiny

CPU = torch.device("cpu")
DEV, DEV8, SCHNELL8, SCHNELL = ORDER
Weights = dict[str, list[Tensor]]
AT_START = (DEV, DEV8, BaseCopy("dev"))  # as on a card of 80 GB


@pytest.fixture
def base_weights() -> dict[str, nn.Module]:
    return tiny.transformers(torch.bfloat16)


def room_for(base_weights, *items) -> int:
    """Bytes of transformers and base weights."""
    found = Transformers(tiny.opened(base_weights), CPU, dynamic=False, budget=None)
    sizes = {key: size(found.modules[key], frozenset()) for key in ORDER}
    for key in (DEV8, SCHNELL8):
        sizes[key] = size(found.modules[key], float8_parameters(found.modules[key]))
    sizes |= {BaseCopy("dev"): sizes[DEV]}
    return sum(sizes[item] for item in items)


def make(base_weights, budget: int | None = None, pin: Any = None) -> Transformers:
    """On a device that is not the host."""
    opened = {
        name: BaseWeights(name, module, lambda module=module: module, Path(name), pin=pin)
        for name, module in base_weights.items()
    }
    for base in opened.values():
        base.open()
    return Transformers(opened, CPU, dynamic=False, budget=budget, placement=Placement(CPU, Late()))


@pytest.fixture(scope="module")
def plain() -> Callable[[Key, pools.Desired], Weights]:
    """The weights of a transformer made from the host alone, by what is merged; made once each."""

    def plain(key: Key, desired: pools.Desired) -> Weights:
        found = pools.make(tiny.transformers(torch.bfloat16))
        found.reconcile(key, desired)
        return bits(found, key)

    return pools.once(plain)


def bits(found: Transformers, key) -> Weights:
    return {
        name: [tensor.clone().view(torch.uint8) for tensor in storage(parameter)]
        for name, parameter in found.modules[key].named_parameters()
    }


def assert_same(one, other) -> None:
    assert one.keys() == other.keys()
    for name, tensors in one.items():
        assert all(map(torch.equal, tensors, other[name])), name


def copied(found: Transformers) -> set[str]:
    """The variants whose base weights are on the device."""
    names = [entry.name for entry in found.entries()]
    return {name.split()[0] for name in names if name.endswith("base copy")}


def spoil(base: nn.Module) -> None:
    """Whoever reads these weights now will show it."""
    for parameter in base.parameters():
        parameter.data.fill_(torch.nan)


def test_once_they_are_on_the_device_no_swap_reads_the_host(base_weights, plain, adapters) -> None:
    desired = [[(adapters["a"], 1.0), (adapters["d"], 0.5)], [(adapters["c"], 1.5)], []]
    expected = {(key, n): plain(key, d) for key in ORDER for n, d in enumerate(desired)}
    found = make(base_weights)
    for key in found.at_start:
        found.reconcile(key, [])
    assert copied(found) == {"dev", "schnell"}
    for base in base_weights.values():
        spoil(base)
    for number, wanted in [(0, desired[0]), (1, desired[1]), (2, []), (0, desired[0])]:
        for key in ORDER:
            found.reconcile(key, wanted)
            assert_same(bits(found, key), expected[key, number])


def test_they_leave_for_a_transformer_and_return_with_the_next_change(
    base_weights, plain, adapters
) -> None:
    found = make(base_weights, room_for(base_weights, *AT_START))
    for key in found.at_start:
        found.reconcile(key, [])
    assert (found.resident, copied(found)) == ((DEV8, DEV), {"dev"})
    for key in (SCHNELL, SCHNELL8):
        found.reconcile(key, [])
        assert_same(bits(found, key), plain(key, []))
    assert copied(found) == set()
    found.reconcile(DEV, [(adapters["b"], 1.0)])
    assert copied(found) == set()  # it held no adapter, so it was its own source
    found.reconcile(DEV, [(adapters["b"], 1.0)])
    assert copied(found) == set()  # nothing has changed
    found.reconcile(DEV, [(adapters["a"], 1.0)])
    assert copied(found) == {"dev"}
    assert DEV in found.resident
    assert_same(bits(found, DEV), plain(DEV, [(adapters["a"], 1.0)]))


@pytest.mark.parametrize(
    "items", [(DEV,), (DEV, DEV8), (DEV, SCHNELL), AT_START, (*AT_START, SCHNELL8)], ids=len
)
def test_no_budget_is_passed_and_every_request_is_served(
    base_weights, plain, adapters, items
) -> None:
    budget = room_for(base_weights, *items)
    found, rng = make(base_weights, budget), random.Random(len(items))
    desired = [(adapters["b"], 1.0)]
    expected = {key: plain(key, desired) for key in ORDER}
    for _ in range(15):
        key, wanted = rng.choice(ORDER), rng.choice([[], desired])
        found.reconcile(key, wanted)
        if wanted:
            assert_same(bits(found, key), expected[key])
        parameters = [p for module in found.modules.values() for p in module.parameters()]
        held = [t for p in parameters for t in storage(p) if not t.is_meta]
        taken = sum(t.numel() * t.element_size() for t in held)
        taken += sum(size(base_weights[name], frozenset()) for name in copied(found))
        assert taken <= budget


def test_out_of_memory_while_they_come_leaves_them_on_the_host(
    base_weights, plain, adapters, monkeypatch, caplog
) -> None:
    def runs_out(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory (pretended)")

    found = make(base_weights)
    with monkeypatch.context() as patch:
        patch.setattr("flux.transformers.copies.DeviceCopies.fill", runs_out)
        for key in ORDER:
            found.reconcile(key, [])
    assert "The base weights of dev stay on the host: CUDA out of memory" in caplog.text
    for desired in ([(adapters["b"], 1.0)], [(adapters["a"], 1.0)], []):
        found.reconcile(DEV, desired)
        assert_same(bits(found, DEV), plain(DEV, desired))
    assert copied(found) == set()
    assert set(found.resident) == set(ORDER)


def test_out_of_memory_in_a_change_of_adapter_is_tried_again_without_them(
    base_weights, plain, adapters, monkeypatch, caplog
) -> None:
    """The device has less memory than the budget says: nothing fits beside one transformer."""
    found = make(base_weights)
    for key in found.at_start:
        found.reconcile(key, [(adapters["b"], 1.0)])
    real = WorkingWeights.reconcile

    def reconcile(weights: WorkingWeights, *arguments: Any) -> Any:
        if copied(found) or len(found.resident) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
        return real(weights, *arguments)

    monkeypatch.setattr(WorkingWeights, "reconcile", reconcile)
    for name in ("a", "b"):
        found.reconcile(DEV, [(adapters[name], 1.0)])
        assert found.resident == (DEV,)
        assert_same(bits(found, DEV), plain(DEV, [(adapters[name], 1.0)]))
    assert caplog.text.count("Out of memory") == 1  # the next change is not tried with them
    assert caplog.text.count("dev base weights stay on the host until the next start") == 1


class CancelledError(Exception):
    pass


@pytest.mark.parametrize("stop", [0, 1, 40])
def test_a_cancel_while_they_come(base_weights, plain, adapters, stop) -> None:
    found, calls = make(base_weights), iter(range(1000))

    def check() -> None:
        if next(calls) == stop:
            raise CancelledError

    with pytest.raises(CancelledError):
        found.reconcile(DEV8, [], check)
    for desired in ([(adapters["b"], 1.0)], [(adapters["a"], 1.0)], []):
        found.reconcile(DEV8, desired)
        assert_same(bits(found, DEV8), plain(DEV8, desired))


def test_memory_on_the_host_is_page_locked_for_what_is_read_there(base_weights, adapters) -> None:
    """In setup for schnell, which has no copy on the device; for dev once that has left."""
    held: list[str] = []
    names = {id(module): name for name, module in base_weights.items()}

    def pin(module: nn.Module) -> bool:
        held.append(names[id(module)])
        return True

    found = make(base_weights, room_for(base_weights, *AT_START), pin)
    for key in found.at_start:
        found.reconcile(key, [])
    found.reconcile(DEV, [(adapters["b"], 1.0)])
    found.reconcile(DEV, [(adapters["a"], 1.0)])
    found.entries()
    assert (copied(found), held) == ({"dev"}, ["schnell"])
    for key in (SCHNELL, SCHNELL8):
        found.reconcile(key, [])
    assert held == ["schnell"]
    for desired in ([(adapters["a"], 1.0)], [(adapters["b"], 1.0)]):
        found.reconcile(DEV, desired)
    assert held == ["schnell", "dev"]


@pytest.mark.parametrize("there", [AT_START, (*AT_START, SCHNELL8)], ids=["80 GB", "96 GB"])
def test_setup_goes_on_while_the_host_copy_is_made_and_waits_at_its_end(
    base_weights, there
) -> None:
    go, threads = threading.Event(), threading.active_count()

    def pin(_: nn.Module) -> bool:
        if not go.wait(10):
            raise TimeoutError("setup waits for the thread")
        return True

    found = make(base_weights, room_for(base_weights, *there), pin)
    assert threading.active_count() == threads  # not beside what is wanted first
    for key in found.at_start:
        found.reconcile(key, [])  # in float8, with the copy, and in bf16 beside the thread
    threading.Timer(0.05, go.set).start()
    rows = {entry.name: entry for entry in found.entries()}
    assert go.is_set()
    assert (rows["schnell base weights"].seconds or 0) > 0
    assert threading.active_count() <= threads + 1  # the timer may be about to end


def test_a_failure_of_the_thread_is_raised_where_it_is_needed(base_weights, plain) -> None:
    outcomes = iter([False, True])

    def pin(_: nn.Module) -> bool:
        if not next(outcomes):
            raise OSError("the disk is gone")
        return True

    found = make(base_weights, room_for(base_weights, *AT_START), pin)
    for key in found.at_start:
        found.reconcile(key, [])
    with pytest.raises(OSError, match="the disk is gone"):
        found.reconcile(SCHNELL8, [])
    found.reconcile(SCHNELL8, [])  # the next request tries again
    assert_same(bits(found, SCHNELL8), plain(SCHNELL8, []))


def test_base_items_are_no_transformers(base_weights) -> None:
    found = make(base_weights)
    assert all(isinstance(item, Key) for item in found.at_start)


@pytest.mark.gpu
def test_swaps_on_a_gpu_read_the_copy(base_weights, adapters) -> None:
    """The host's weights are spoilt; what is restored is what was brought in the beginning."""
    opened = tiny.opened(base_weights)
    for base in opened.values():
        base.open()
    found = Transformers(opened, torch.device("cuda"), dynamic=False, budget=None)
    for key in found.at_start:
        found.reconcile(key, [])
    before = {key: bits(found, key) for key in ORDER}
    assert copied(found) == {"dev", "schnell"}
    for module in base_weights.values():
        spoil(module)
    for key in ORDER:
        for desired in ([(adapters["a"], 1.0)], [(adapters["b"], 1.0)], []):
            found.reconcile(key, desired)
        assert_same(bits(found, key), before[key])
