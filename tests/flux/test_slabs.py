"""Memory for weights: how much there is, and the slabs on the host that hold them."""

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from flux.memory import DEVICE_RESERVE, HOST_RESERVE, bytes_of, device_budget, host_budget
from flux.slabs import PageLocked, Slabs, hold
from tests import tiny
from weights.inventory import PAGE_LOCKED, place_of

CPU = torch.device("cpu")


@pytest.fixture
def masters() -> dict[str, nn.Module]:
    return tiny.transformers(torch.bfloat16)


def test_held_copies_equal_the_map_and_share_few_slabs(masters, monkeypatch) -> None:
    monkeypatch.setattr("flux.slabs.SLAB", 1 << 16)
    master = masters["dev"]
    before = [parameter.detach().clone() for parameter in master.parameters()]
    assert hold(master, page_locked=False)
    assert all(map(torch.equal, master.parameters(), before))
    storages = [parameter.untyped_storage() for parameter in master.parameters()]
    slabs = {slab.data_ptr(): slab.nbytes() for slab in storages}
    assert bytes_of(master) <= sum(slabs.values()) <= 1.5 * bytes_of(master) + (1 << 16)
    assert len(slabs) < len(list(master.parameters())) / 4


def test_host_memory_goes_to_who_opens_first(masters, monkeypatch) -> None:
    monkeypatch.setattr("flux.slabs.SLAB", 1 << 16)
    monkeypatch.setattr("flux.slabs.Slabs", lambda **_: Slabs(page_locked=False))
    dev, schnell = masters.values()
    pointers = [p.data_ptr() for p in schnell.parameters()]
    scarce = PageLocked(bytes_of(dev) + bytes_of(schnell) - 1)
    assert scarce.hold(dev)
    assert not scarce.hold(schnell)
    assert [p.data_ptr() for p in schnell.parameters()] == pointers
    enough = PageLocked(bytes_of(dev) + bytes_of(schnell))
    assert [enough.hold(module) for module in (dev, schnell)] == [True, True]


def test_without_memory_to_lock_the_map_serves(masters, monkeypatch, caplog) -> None:
    master = masters["dev"]
    pointers = [p.data_ptr() for p in master.parameters()]

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr("flux.slabs.torch.empty", refuse)
    assert not hold(master, page_locked=True)
    assert [p.data_ptr() for p in master.parameters()] == pointers
    assert "stay in the memory map. There are no" in caplog.text
    assert "CUDA error: out of memory" in caplog.text


def test_slabs_before_one_that_failed_go_back_to_the_system(masters, monkeypatch) -> None:
    """torch keeps page-locked memory that nothing uses, unless it is asked to let go of it."""
    slabs, empty, kept = [], torch.empty, []

    def two(size: int, *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        if len(slabs) == 2:
            raise RuntimeError("CUDA error: out of memory")
        slab = empty(size, dtype=dtype)
        slabs.append(StorageWeakRef(slab.untyped_storage()))
        return slab

    def let_go() -> None:
        kept.append([slab for slab in slabs if not slab.expired()])

    monkeypatch.setattr("flux.slabs.SLAB", 1 << 12)
    monkeypatch.setattr("flux.slabs.torch.empty", two)
    monkeypatch.setattr("flux.slabs.torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("flux.slabs.torch.accelerator.empty_host_cache", let_go)
    assert not hold(masters["dev"], page_locked=True)
    assert (len(slabs), kept) == (2, [[]])


def test_budgets_as_set_and_as_measured(tmp_path) -> None:
    assert device_budget(None, CPU, loaded=5) is None
    assert device_budget(100, CPU, loaded=5) == 95
    limit = tmp_path / "memory.max"
    limit.write_text(f"{HOST_RESERVE + 7}\n")
    assert host_budget(3, limit) == 3
    assert host_budget(None, limit) == 7
    limit.write_text("max\n")
    assert host_budget(None, limit) == host_budget(None, tmp_path / "absent")


@pytest.mark.gpu
def test_on_a_gpu(masters) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    device = torch.device("cuda")
    free, _ = torch.cuda.mem_get_info(device)
    assert device_budget(None, device, loaded=0) <= free - DEVICE_RESERVE
    assert hold(masters["dev"], page_locked=True)
    assert place_of(masters["dev"].parameters()) == PAGE_LOCKED
