"""Adapters on the device and a kernel's part in a merge, with a stand-in for the kernel."""

import gc
import logging
from collections import Counter

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from flux.transformers.adapters import BaseValues
from flux.transformers.merge import WorkingWeights
from flux.transformers.one_pass import OnePass, PageLockedWay, one_pass
from tests.flux.low_rank import Kernel, base, bits, factors, same, whole, working
from tests.flux.merging import SIZE, assert_bits, state
from tests.flux.pools import DEV, assert_same, make
from tests.flux.pools import bits as bits_of
from tests.support import tiny

ROWS, COLUMNS = 32, 48
ROOM = 1 << 20
CPU = torch.device("cpu")


class Bus:
    """The way to the device; what passes it is counted, and what is there."""

    def __init__(self) -> None:
        self.sent = self.most = 0
        self._brought: list[tuple[StorageWeakRef, int]] = []

    @property
    def there(self) -> int:
        """Bytes on the device."""
        return sum(size for storage, size in self._brought if not storage.expired())

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        self.sent += tensor.nbytes
        brought = tensor.clone()
        self._brought.append((StorageWeakRef(brought.untyped_storage()), brought.nbytes))
        self.most = max(self.most, self.there)
        return brought


@pytest.fixture
def values() -> dict[str, torch.Tensor]:
    return {name: base(ROWS, COLUMNS) for name in "qkv"}


def lora(digest: str, names: str = "qkv", rank: int = 4, dtype=torch.bfloat16):
    deltas = {n: factors(ROWS, COLUMNS, rank, dtype, ord(n)) for n in names}
    return whole(digest, **deltas)


def test_adapters_cross_the_bus_once_and_another_scale_is_a_vector(values) -> None:
    bus, a, b = Bus(), lora("a"), lora("b", "kv", 9)
    weights, found = working(values, OnePass(Kernel(), ROOM, bus))
    weights.reconcile([(a, 1.0), (b, 0.5)])
    first, both = bits(found), bus.sent
    assert a.nbytes + b.nbytes <= both <= a.nbytes + b.nbytes + 4 * (3 * 4 + 2 * 9)
    weights.reconcile([(b, 0.5), (a, -2.0)])
    assert 0 < bus.sent - both <= 4 * (3 * 4 + 2 * 9)
    before = bus.sent
    weights.reconcile([])
    weights.reconcile([(b, 0.5), (a, 1.0)])
    assert bus.sent == before
    assert same(bits(found), first)


def test_the_least_recently_used_leave(values) -> None:
    a, b, c = (lora(name) for name in "abc")
    bus = Bus()
    weights, _ = working(values, OnePass(Kernel(), 2 * a.nbytes, bus))

    def sent(adapter) -> bool:
        before = bus.sent
        weights.reconcile([(adapter, 1.0)])
        return bus.sent > before

    assert [sent(x) for x in (a, b, a, c, a, b)] == [True, True, False, True, False, True]
    scales = 3 * 3 * 4 * 4  # fp32, of three adapters at most
    assert 2 * a.nbytes <= bus.most <= 2 * a.nbytes + scales


def test_what_is_larger_than_the_limit_is_merged_from_the_host(values, caplog) -> None:
    caplog.set_level(logging.INFO, "flux")
    adapter, kernel, bus = lora("a"), Kernel(), Bus()
    weights, found = working(values, OnePass(kernel, adapter.nbytes - 1, bus))
    reference, expected = working(values)
    for scale in (1.0, 0.5):
        for each in (weights, reference):
            each.reconcile([(adapter, scale)])
        assert same(bits(found), bits(expected))
    assert (kernel.written, bus.sent) == (0, 0)
    assert caplog.text.count("merged from the host") == 1


def test_what_is_sent_beside_the_factors_counts_to_the_limit(adapters) -> None:
    """Differences of all kinds, of which `d` has some."""
    bus, both = Bus(), [(adapters["b"], 1.0), (adapters["d"], 1.0)]
    WorkingWeights(tiny.modules(SIZE), one_pass=OnePass(Kernel(), ROOM, bus)).reconcile(both)
    sent, bus = bus.sent, Bus()
    limit = sent - adapters["d"].nbytes // 2
    WorkingWeights(tiny.modules(SIZE), one_pass=OnePass(Kernel(), limit, bus)).reconcile(both)
    assert bus.sent == 0


class Operators(TorchDispatchMode):
    """Counts torch's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.__name__.partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def test_a_warm_swap_calls_none_of_torchs_operators(values) -> None:
    """None, so none that a stream waits for; without the kernel there are two for each weight."""
    kernel = Kernel()
    a, b = lora("a"), lora("b")

    def swap(merging: OnePass | None) -> Counter[str]:
        weights, _ = working(values, merging)
        for adapter in (a, b, a):
            weights.reconcile([(adapter, 1.0)])
        with Operators() as seen:
            weights.reconcile([(b, 1.0)])
        return seen.calls

    def without_operators(*arguments) -> bool:
        with torch.utils._python_dispatch._disable_current_modes():
            return kernel(*arguments)

    assert swap(OnePass(without_operators, ROOM, Bus())) == {}
    assert kernel.written == 4 * len(values)
    assert swap(None)["_to_copy"] == 2 * len(values)  # of factors: widened here, sent on a card


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_kernel_that_fails_is_left_alone_and_no_request_fails(values, caplog, at) -> None:
    kernel = Kernel(RuntimeError("PTXAS error: injected"), at)
    adapter = lora("a", dtype=torch.float32)
    weights, found = working(values, OnePass(kernel, ROOM, Bus()))
    reference, expected = working(values)
    for scale in (1.0, 0.5):
        for each in (weights, reference):
            each.reconcile([(adapter, scale)])
        assert weights.record("transformer", "q") == (("a", scale),)
        for name, weight in found.items():
            torch.testing.assert_close(weight, expected[name], rtol=2**-7, atol=1e-6)
    assert kernel.written == at - 1
    assert caplog.text.count("PTXAS error: injected") == 1
    assert "Traceback" in caplog.text
    assert "until" in caplog.text


def test_a_kernel_that_failed_leaves_nothing_on_the_device(values, caplog) -> None:
    caplog.set_level(logging.CRITICAL, "flux")  # what is caught of the log holds the traceback
    kernel, bus = Kernel(RuntimeError("PTXAS error: injected")), Bus()
    weights, _ = working(values, OnePass(kernel, ROOM, bus))
    weights.reconcile([(lora("a"), 1.0)])
    kernel.error = None  # as it does itself
    gc.collect()
    assert bus.sent > bus.there == 0


def test_a_kernel_that_fails_while_it_is_compiled_in_setup_fails_no_request(values, caplog) -> None:
    merging = OnePass(Kernel(RuntimeError("PTXAS error: injected")), ROOM, Bus())
    merging.warm_up(torch.bfloat16)
    assert "PTXAS error: injected" in caplog.text
    weights, found = working(values, merging)
    reference, expected = working(values)
    for each in (weights, reference):
        each.reconcile([(lora("a"), 1.0)])
    assert same(bits(found), bits(expected))


def test_a_lack_of_memory_in_setup_leaves_the_kernel_to_the_first_request(values) -> None:
    kernel = Kernel(torch.OutOfMemoryError("CUDA out of memory (pretended)"))
    merging = OnePass(kernel, ROOM, Bus())
    merging.warm_up(torch.bfloat16)
    kernel.error = None
    weights, _ = working(values, merging)
    weights.reconcile([(lora("a"), 1.0)])
    assert kernel.written == len(values)


def test_adapters_leave_where_memory_is_short_and_come_again(base_weights, pair) -> None:
    bus, times = Bus(), iter(range(1))
    transformers = make(base_weights, one_pass=OnePass(Kernel(), ROOM, bus))
    transformers.reconcile(DEV, [(pair[0], 1.0)])
    before, merged = bus.sent, bits_of(transformers.modules[DEV])

    def work() -> None:
        if next(times, None) is not None:
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")

    transformers.with_room(DEV, work)
    transformers.reconcile(DEV, [])
    transformers.reconcile(DEV, [(pair[0], 1.0)])
    assert bus.sent == 2 * before
    assert_same(bits_of(transformers.modules[DEV]), merged)


def test_a_lack_of_memory_is_no_failure_of_the_kernel(values) -> None:
    kernel = Kernel(torch.OutOfMemoryError("injected"))
    weights, _ = working(values, OnePass(kernel, ROOM, Bus()))
    with pytest.raises(torch.OutOfMemoryError):
        weights.reconcile([(lora("a"), 1.0)])
    kernel.error = None
    weights.reconcile([(lora("a"), 1.0)])
    assert kernel.written == len(values)


def test_what_the_kernel_refuses_is_merged_from_the_device(values) -> None:
    """Float8 weights on cards before Hopper: the kernel leaves them to torch's operators."""
    deltas = {name: factors(ROWS, COLUMNS, 4, torch.bfloat16, ord(name)) for name in "qkv"}
    weights, found = working(values, OnePass(lambda *_: False, ROOM, Bus()), float8=True)
    reference, expected = working(values, float8=True)
    for each in (weights, reference):
        each.reconcile([(whole("a", **deltas), 0.5)])
        each.reconcile([])
    reference.reconcile([(whole("a", **deltas), 1.0)])
    for delta in deltas.values():
        delta.up.fill_(torch.nan)  # on the host
    weights.reconcile([(whole("a", **deltas), 1.0)])
    for name, weight in found.items():
        exact = expected[name].dequantize(torch.float32)
        torch.testing.assert_close(weight.dequantize(torch.float32), exact, rtol=2**-3, atol=1e-6)


def test_without_page_locked_memory_factors_come_all_the_same(caplog) -> None:
    tensor, send = torch.randn(3, 4), PageLockedWay(CPU)
    for _ in range(2):
        assert torch.equal(send(tensor), tensor)  # nothing can be page-locked without a card
    assert caplog.text.count("memory that is not page-locked") == 1


@pytest.mark.parametrize("last", ["d", "e"])
def test_other_kinds_keep_their_path_with_what_is_on_the_device(adapters, last) -> None:
    """DoRA, LoKr, rotations, differences and biases, also beside a LoRA of the same weight."""

    def swap(make: BaseValues | None, merging: OnePass | None):
        modules = tiny.modules(SIZE)
        weights = WorkingWeights(modules, make, one_pass=merging)
        for names in (f"c{last}", f"bc{last}", last):
            weights.reconcile([(adapters[name], 0.7) for name in names])
        return state(modules)

    kernel = Kernel()
    found, expected = swap(None, OnePass(kernel, ROOM, Bus())), swap(None, None)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
    adapter = adapters[last]
    others = {key for key in adapter.parameters if adapter.low_rank(*key) is None}
    assert len(others) == len(adapter.parameters)
    assert_bits({key: found[key] for key in others}, {key: expected[key] for key in others})
    assert 0 < kernel.written < len(adapters["b"].parameters)


def test_a_cancel_between_weights_heals(values) -> None:
    calls = iter(range(10))

    def check() -> None:
        if next(calls) == 2:
            raise KeyboardInterrupt

    weights, found = working(values, OnePass(Kernel(), ROOM, Bus()))
    with pytest.raises(KeyboardInterrupt):
        weights.reconcile([(lora("a"), 1.0)], check)
    assert weights.reconcile([(lora("a"), 1.0)]).merged == 1
    other, expected = working(values, OnePass(Kernel(), ROOM, Bus()))
    other.reconcile([(lora("a"), 1.0)])
    assert same(bits(found), bits(expected))


def test_a_cpu_merges_by_torchs_operators() -> None:
    assert one_pass(CPU, ROOM) is None


def test_a_machine_without_triton_is_told(monkeypatch, caplog) -> None:
    caplog.set_level(logging.INFO, "flux")
    monkeypatch.setattr("flux.transformers.one_pass.find_spec", lambda _: None)
    assert one_pass(torch.device("cuda"), ROOM) is None
    assert "there is no Triton" in caplog.text
    assert one_pass(torch.device("cuda"), 0) is None
