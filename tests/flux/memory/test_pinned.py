"""Memory for weights: how much there is, and the chunks on the host that hold them."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.multiprocessing.reductions import StorageWeakRef

from benchmarks.shared import flux1
from flux.memory.budget import DEVICE_RESERVE, HOST_RESERVE, bytes_of, device_budget, host_budget
from flux.memory.device import empty_cache, is_out_of_memory
from flux.memory.pinned import Arena, PinnedBudget, empty_host_cache, move_parameters
from flux.memory.residency import BudgetError
from flux.transformers.float8 import float8_parameters
from tests.support import tiny
from weights.serving.inventory import PAGE_LOCKED, place_of

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[3]


@pytest.fixture
def base_weights() -> dict[str, nn.Module]:
    return tiny.transformers(torch.bfloat16)


def test_held_copies_equal_the_map_and_share_few_slabs(base_weights, monkeypatch) -> None:
    monkeypatch.setattr("flux.memory.pinned.CHUNK", 1 << 16)
    base = base_weights["dev"]
    before = [parameter.detach().clone() for parameter in base.parameters()]
    assert move_parameters(base, pinned=False)
    assert all(map(torch.equal, base.parameters(), before))
    storages = [parameter.untyped_storage() for parameter in base.parameters()]
    chunks = {chunk.data_ptr(): chunk.nbytes() for chunk in storages}
    assert bytes_of(base) <= sum(chunks.values()) <= 1.2 * bytes_of(base) + (1 << 16)
    assert len(chunks) < len(list(base.parameters())) / 4


def test_chunks_of_flux_take_little_more_than_its_weights(monkeypatch) -> None:
    chunks: list[int] = []

    def another(_: Arena, size: int) -> torch.Tensor:
        chunks.append(1 << (size - 1).bit_length())  # as the allocator rounds
        return torch.empty(size, dtype=torch.uint8, device="meta")

    monkeypatch.setattr(Arena, "_another", another)
    transformer, t5 = flux1.transformer("dev"), flux1.t5()
    float8 = float8_parameters(transformer)
    for module, narrow in ((transformer, frozenset()), (transformer, float8), (t5, frozenset())):
        chunks.clear()
        arena, needed = Arena(pinned=False), 0
        for name, weight in module.named_parameters():
            dtype = torch.float8_e4m3fn if name in narrow else weight.dtype
            needed += arena.empty(weight.shape, dtype).nbytes
        assert needed > 9e9
        assert needed <= sum(chunks) <= 1.05 * needed


def test_host_memory_goes_to_who_opens_first(base_weights, monkeypatch) -> None:
    monkeypatch.setattr("flux.memory.pinned.CHUNK", 1 << 16)
    monkeypatch.setattr("flux.memory.pinned.Arena", lambda **_: Arena(pinned=False))
    dev, schnell = base_weights.values()
    pointers = [p.data_ptr() for p in schnell.parameters()]
    scarce = PinnedBudget(bytes_of(dev) + bytes_of(schnell) - 1)
    assert scarce.pin(dev)
    assert not scarce.pin(schnell)
    assert [p.data_ptr() for p in schnell.parameters()] == pointers
    enough = PinnedBudget(bytes_of(dev) + bytes_of(schnell))
    assert [enough.pin(module) for module in (dev, schnell)] == [True, True]


def test_two_that_open_at_once_do_not_both_take_the_last_of_it(monkeypatch) -> None:
    module = nn.Linear(10, 10)
    scarce, both = PinnedBudget(bytes_of(module)), threading.Barrier(2)

    def move(*_: object, **__: object) -> bool:
        with suppress(threading.BrokenBarrierError):
            both.wait(0.1)  # for the other one
        return True

    monkeypatch.setattr("flux.memory.pinned.move_parameters", move)
    with ThreadPoolExecutor(2) as threads:
        assert sorted(threads.map(scarce.pin, [module, module])) == [False, True]


def test_without_memory_to_lock_the_map_serves(base_weights, monkeypatch, caplog) -> None:
    base = base_weights["dev"]
    pointers = [p.data_ptr() for p in base.parameters()]

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr("flux.memory.pinned.torch.empty", refuse)
    assert not move_parameters(base, pinned=True)
    assert [p.data_ptr() for p in base.parameters()] == pointers
    assert "stay in the memory map: There are no" in caplog.text
    assert "CUDA error: out of memory" in caplog.text


def test_slabs_before_one_that_failed_go_back_to_the_system(base_weights, monkeypatch) -> None:
    """torch keeps page-locked memory that nothing uses, unless it is asked to let go of it."""
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "pinned_use_cuda_host_register:False")
    chunks, empty, kept = [], torch.empty, []

    def two(size: int, *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        if len(chunks) == 2:
            raise RuntimeError("CUDA error: out of memory")
        chunk = empty(size, dtype=dtype)
        chunks.append(StorageWeakRef(chunk.untyped_storage()))
        return chunk

    def let_go() -> None:
        kept.append([chunk for chunk in chunks if not chunk.expired()])

    monkeypatch.setattr("flux.memory.pinned.CHUNK", 1 << 12)
    monkeypatch.setattr("flux.memory.pinned.torch.empty", two)
    monkeypatch.setattr("flux.memory.pinned.torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(
        "flux.memory.pinned.torch.accelerator.empty_host_cache", let_go, raising=False
    )
    assert not move_parameters(base_weights["dev"], pinned=True)
    assert (len(chunks), kept) == (2, [[]])


def test_an_older_torch_gives_page_locked_memory_back_as_well(monkeypatch) -> None:
    """torch 2.11 has no torch.accelerator.empty_host_cache."""
    calls: list[str] = []
    monkeypatch.setattr("flux.memory.pinned.torch.cuda.is_available", lambda: True)
    monkeypatch.delattr("flux.memory.pinned.torch.accelerator.empty_host_cache", raising=False)
    old = "flux.memory.pinned.torch._C._host_emptyCache"
    monkeypatch.setattr(old, lambda: calls.append("empty"), raising=False)
    empty_host_cache()
    assert calls == ["empty"]


REGISTER = "pinned_use_cuda_host_register:True,pinned_num_register_threads:"


@pytest.fixture
def allocator(monkeypatch) -> list[str]:
    """What torch's allocator is told, on a machine with CUDA and 6 cores."""
    told: list[str] = []
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("flux.memory.pinned.os.cpu_count", lambda: 6)
    monkeypatch.setattr("flux.memory.pinned.torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(
        "flux.memory.pinned.torch._C._accelerator_setAllocatorSettings", told.append
    )
    empty = torch.empty
    monkeypatch.setattr("flux.memory.pinned.torch.empty", lambda size, **_: empty(size))
    return told


def test_page_locking_takes_several_threads(allocator, monkeypatch) -> None:
    Arena(pinned=False)
    assert allocator == []
    Arena(pinned=True)
    monkeypatch.setattr("flux.memory.pinned.os.cpu_count", lambda: 64)
    Arena(pinned=True)
    assert allocator == [f"{REGISTER}4", f"{REGISTER}8"]


@pytest.mark.parametrize("variable", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_what_the_operator_has_told_the_allocator_stays(allocator, monkeypatch, variable) -> None:
    monkeypatch.setenv(variable, "expandable_segments:True")
    Arena(pinned=True)
    assert allocator == [f"expandable_segments:True,{REGISTER}4"]
    monkeypatch.setenv(variable, "pinned_use_cuda_host_register:False")
    Arena(pinned=True)
    assert len(allocator) == 1


def test_where_memory_cannot_be_registered_it_is_locked_as_before(
    allocator, monkeypatch, caplog
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: operation not supported")

    monkeypatch.setattr("flux.memory.pinned.torch.empty", refuse)
    Arena(pinned=True)
    assert allocator == [f"{REGISTER}4", "pinned_use_cuda_host_register:False"]
    assert "with one thread, as pinned_use_cuda_host_register:True" in caplog.text


def test_a_torch_that_takes_no_such_setting_locks_pages_as_before(
    allocator, monkeypatch, caplog
) -> None:
    def refuse(_: str) -> None:
        raise RuntimeError("Unrecognized key")

    monkeypatch.setattr("flux.memory.pinned.torch._C._accelerator_setAllocatorSettings", refuse)
    Arena(pinned=True)
    assert "Unrecognized key" in caplog.text


def test_this_torch_takes_the_settings() -> None:
    """In a process of its own, for they stay; CUDA's own parser is asked where there is CUDA."""
    if not hasattr(torch._C, "_accelerator_getAllocatorSettings"):
        pytest.skip("torch 2.11 cannot say what its allocator was told")
    command = """
import torch
torch.cuda.is_available = lambda: True
empty, torch.empty = torch.empty, lambda *shape, **_: empty(*shape)
from flux.memory.pinned import Arena
Arena(pinned=True)
print(torch._C._accelerator_getAllocatorSettings())
"""
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert REGISTER in done.stdout
    assert "one thread" not in done.stderr


def test_budgets_as_set_and_as_measured(tmp_path) -> None:
    assert device_budget(None, CPU, loaded=5) is None
    assert device_budget(100, CPU, loaded=5) == 95


NO_LIMIT = f"{2**63 - 4096}\n"


@pytest.mark.parametrize(
    ("limits", "own", "left"),
    [
        ({"memory.max": 7}, "0::/", 7),
        ({"memory.max": 7}, "0::/docker/4f2a", 7),  # the container's own is mounted as the root
        ({"system.slice/flux.service/memory.max": 6}, "0::/system.slice/flux.service", 6),
        ({"a/memory.max": 8, "a/b/memory.max": "max\n"}, "0::/a/b", 8),
        ({"memory/memory.limit_in_bytes": 5, "memory.max": 7}, "0::/", 5),
        (
            {"memory/job/memory.limit_in_bytes": 4, "memory/memory.limit_in_bytes": NO_LIMIT},
            "4:memory:/job\n1:name=systemd:/\n0::/",
            4,
        ),
        ({"memory.max": "max\n", "memory/memory.limit_in_bytes": NO_LIMIT}, "0::/", None),
        ({"other.slice/memory.max": 3}, "0::/mine", None),
    ],
)
def test_limits_of_control_groups_count(tmp_path, limits, own, left) -> None:
    for name, limit in limits.items():
        file = tmp_path / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(limit if isinstance(limit, str) else f"{HOST_RESERVE + limit}\n")
    (tmp_path / "own").write_text(own)
    found = host_budget(None, tmp_path / "cgroup", tmp_path / "own")
    machine = host_budget(None, tmp_path / "nothing", tmp_path / "nothing")
    assert found == (machine if left is None else left)
    assert host_budget(3, tmp_path / "cgroup", tmp_path / "own") == 3


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory",
        "Triton Error [CUDA]: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED_ALLOCATION_FAILED",
        "GET was unable to find an engine to execute this computation",
    ],
)
def test_messages_of_a_device_without_memory(message: str) -> None:
    assert is_out_of_memory(RuntimeError(message))
    assert is_out_of_memory(BackendCompilerFailed(print, RuntimeError(message), None))


def test_messages_of_other_failures() -> None:
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access"))
    assert not is_out_of_memory(RuntimeError("out of resource: shared memory, Required: 300000"))
    assert not is_out_of_memory(ValueError("out of memory"))
    assert not is_out_of_memory(BudgetError("no page-locked memory (CUDA error: out of memory)"))


@pytest.mark.gpu
def test_on_a_gpu(base_weights) -> None:
    device = torch.device("cuda")
    empty_cache(device)  # of what other tests left with the allocator
    free, _ = torch.cuda.mem_get_info(device)
    assert device_budget(None, device, loaded=0) <= free - DEVICE_RESERVE
    assert move_parameters(base_weights["dev"], pinned=True)
    assert place_of(base_weights["dev"].parameters()) == PAGE_LOCKED
