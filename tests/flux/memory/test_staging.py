"""Copies on a stream of their own: whenever they are made, the weights are the same, and ready."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from flux.memory.budget import bytes_of
from flux.memory.offload import Placement
from flux.memory.residency import ORDER
from flux.memory.staging import CopyStream, Staging, move
from flux.transformers.merge import UNKNOWN, WorkingWeights
from flux.transformers.pool import Transformers
from flux.variants import Key
from tests.flux import pools
from tests.flux.merging import SIZE
from tests.flux.streams import Early, Late
from tests.support import tiny

CPU = torch.device("cpu")


@pytest.fixture(
    params=[(Late, False), (Early, False), (Late, True), (Early, True)],
    ids=["late", "early", "late, from a map", "early, from a map"],
)
def stream(request, monkeypatch) -> Late:
    kind, pageable = request.param
    monkeypatch.setattr("flux.memory.staging.PIECE", 1 << 10)  # most weights are several pieces
    return kind(pageable=pageable)


@pytest.fixture(scope="module")
def base_weights() -> dict[str, torch.nn.Module]:
    return tiny.transformers(torch.bfloat16)


def transformers(base_weights, stream) -> Transformers:
    placement = Placement(CPU, stream) if stream else None
    return Transformers(
        tiny.opened(base_weights), CPU, dynamic=False, budget=None, placement=placement
    )


@pytest.fixture(scope="module")
def plain(base_weights) -> Callable[..., dict[str, Tensor]]:
    """The weights of a transformer without a stream, by what is merged; made once each."""
    found = transformers(base_weights, None)

    def plain(key: Key, desired: pools.Desired) -> dict[str, Tensor]:
        found.reconcile(key, desired)
        return bits(found, key)

    return pools.once(plain)


def bits(found: Transformers, key) -> dict[str, Tensor]:
    return {
        name: parameter.dequantize() if hasattr(parameter, "qdata") else parameter.detach().clone()
        for name, parameter in found.modules[key].named_parameters()
    }


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("key", ORDER, ids="-".join)
def test_whenever_copies_are_made_the_weights_are_the_same(
    base_weights, plain, adapters, stream, key
) -> None:
    """Adapters of every kind, one after another; a DoRA reads several base weights."""
    beside = transformers(base_weights, stream)
    for desired in ([(adapters["a"], 1.0), (adapters["d"], 0.5)], [], [(adapters["c"], 1.5)], []):
        beside.reconcile(key, desired)
        assert stream.under_way == []
        assert_same(bits(beside, key), plain(key, desired))


def test_two_buffers_of_the_largest_weight_are_all_that_is_taken(base_weights) -> None:
    stream = Late()
    weights = [parameter.detach() for parameter in base_weights["dev"].parameters()]
    weights.sort(key=torch.numel, reverse=True)
    staging = Staging(CPU, stream)
    for near, weight in zip(staging.prefetch(iter(weights)), weights, strict=True):
        assert torch.equal(near, weight)
    assert len(stream.targets) == 2


def test_one_copy_is_under_way_while_the_weight_before_is_used(base_weights) -> None:
    stream = Late()
    weights = [parameter.detach() for parameter in base_weights["dev"].parameters()]
    under_way = [len(stream.under_way) for _ in Staging(CPU, stream).prefetch(weights)]
    assert under_way == [1] * (len(weights) - 1) + [0]


def test_a_module_moves_with_its_buffers_and_its_ties(stream, monkeypatch) -> None:
    monkeypatch.setattr("flux.memory.staging.copy_stream", lambda _: stream)
    module = nn.Sequential(nn.Linear(30, 40), nn.BatchNorm1d(40), nn.Linear(30, 40))
    module[2].weight = module[0].weight
    before = {name: value.clone() for name, value in module.state_dict().items()}
    pointer = module[0].weight.data_ptr()
    move(module, CPU)
    assert_same(module.state_dict(), before)
    assert module[0].weight is module[2].weight
    assert module[0].weight.data_ptr() != pointer
    assert stream.sent == bytes_of(module)


def test_what_is_on_the_device_already_is_not_copied(base_weights) -> None:
    class Mixed(Late):
        def needs_copy(self, source: Tensor) -> bool:
            return source.dim() > 1

    stream = Mixed()
    weights = [parameter.detach() for parameter in base_weights["dev"].parameters()]
    for near, weight in zip(Staging(CPU, stream).prefetch(weights), weights, strict=True):
        assert torch.equal(near, weight)
        assert (near is weight) == (weight.dim() == 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn], ids=str)
def test_what_is_in_a_map_passes_through_few_pieces_of_memory(monkeypatch, dtype) -> None:
    monkeypatch.setattr("flux.memory.staging.PIECE", 100)
    stream = Late(pageable=True)
    sizes = [(1,), (50,), (51, 7), (0,), (4, 5, 60), (100,)]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    weights.append(torch.randn(30, 20, generator=generator).to(dtype).T)  # not in order
    for near, weight in zip(Staging(CPU, stream).prefetch(weights), weights, strict=True):
        assert torch.equal(near.float(), weight.float())
    assert [piece.numel() for piece in stream.pieces] == [100] * 4


def test_what_is_page_locked_needs_no_such_memory(base_weights) -> None:
    stream = Late()
    for _ in Staging(CPU, stream).prefetch(p.detach() for p in base_weights["dev"].parameters()):
        pass
    assert stream.pieces == []


def test_without_memory_to_lock_copies_hold_the_host_up(base_weights, caplog) -> None:
    class Poor(Late):
        def pinned_buffer(self, size: int) -> Tensor:
            raise RuntimeError("CUDA error: out of memory (pretended)")

    weights = [parameter.detach() for parameter in base_weights["dev"].parameters()]
    staging = Staging(CPU, Poor(pageable=True))
    for _ in range(2):
        for near, weight in zip(staging.prefetch(weights), weights, strict=True):
            assert torch.equal(near, weight)
    assert caplog.text.count("without a buffer: CUDA error: out of memory") == 1


class CancelledError(Exception):
    pass


@pytest.mark.parametrize("stop", [0, 1, 7])
def test_what_comes_after_a_cancel_waits_for_the_copies_under_way(
    base_weights, plain, adapters, stream, stop
) -> None:
    """Memory that is given back then may be used by the next steps at once."""
    found, calls = transformers(base_weights, stream), iter(range(1000))

    def check() -> None:
        if next(calls) == stop:
            raise CancelledError

    with pytest.raises(CancelledError):
        found.reconcile(ORDER[0], [], check)
    assert stream.under_way == []
    desired = [(adapters["b"], 1.0)]
    found.reconcile(ORDER[0], desired)
    assert_same(bits(found, ORDER[0]), plain(ORDER[0], desired))


def test_the_streams_meet_before_generating_also_with_nothing_to_write(base_weights) -> None:
    stream = Late()
    found = transformers(base_weights, stream)
    found.reconcile(ORDER[0], [])
    stream.fail_at = 1
    with pytest.raises(RuntimeError, match="injected"):
        found.reconcile(ORDER[0], [])


def test_records_are_set_after_the_wait_and_not_after_the_enqueueing(adapters) -> None:
    modules = tiny.modules(SIZE, torch.bfloat16)
    names = [("transformer", name) for name, _ in modules["transformer"].named_parameters()]
    before = {
        name: modules["transformer"].get_parameter(name).detach().clone() for _, name in names
    }
    adapter = adapters["b"]
    last = 2 + len(adapter.parameters)  # one meeting for each weight, one for the last, the wait
    stream = Late()
    weights = WorkingWeights(modules, staging=Staging(CPU, stream))
    stream.fail_at = last
    with pytest.raises(RuntimeError, match="injected"):
        weights.reconcile([(adapter, 1.0)])
    assert {weights.record(*key) for key in adapter.parameters} == {UNKNOWN}
    assert weights.reconcile([]).restored == len(adapter.parameters)
    for _, name in names:
        assert torch.equal(modules["transformer"].get_parameter(name), before[name])


@pytest.mark.gpu
def test_copies_on_a_gpu_come_between_what_is_computed() -> None:
    """The buffers are read by slow work, which a copy that does not wait would overtake."""
    device = torch.device("cuda")
    sources = [torch.full((1 << 24,), float(k)) for k in range(8)]
    sources = [source.pin_memory() if k % 2 else source for k, source in enumerate(sources)]
    busy, sums = torch.eye(4096, device=device), []
    for near in Staging(device, CopyStream(device)).prefetch(sources):
        for _ in range(10):  # some milliseconds, before it is read
            busy = busy @ busy
        sums.append(near.double().sum())
    assert [float(total) for total in sums] == [float(k << 24) for k in range(8)]
