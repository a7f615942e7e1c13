"""CUDA's part, played by the CPU: streams that copy when they may, page-locked memory, a device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.hooks import group_offloading
from torch import Tensor
from torchao.quantization.quantize_.workflows import Float8Tensor

from flux.memory.pinned import Arena


class Late:
    """A copy stream that copies as late as its promise allows: when the streams meet.

    Args:
        pageable: whether all sources are in memory from which copies would hold the host up.
    """

    def __init__(self, *, pageable: bool = False) -> None:
        self.pageable = pageable
        self.pieces: list[Tensor] = []
        self.sent = 0  # bytes
        self.under_way: list[tuple[Tensor, Tensor]] = []
        self.targets: set[int] = set()
        self.fail_at = -1  # the number of meetings until one fails

    def needs_copy(self, source: Tensor) -> bool:
        return True

    def blocks_host(self, source: Tensor) -> bool:
        return self.pageable

    def pinned_buffer(self, size: int) -> Tensor:
        self.pieces.append(torch.empty(size, dtype=torch.uint8))
        return self.pieces[-1]

    def record_event(self) -> Callable[[], None]:
        before = list(self.under_way)

        def wait() -> None:
            for copy in before:
                if any(copy is other for other in self.under_way):
                    copy[0].copy_(copy[1])
            self.under_way = [c for c in self.under_way if not any(c is b for b in before)]

        return wait

    def copy(self, target: Tensor, source: Tensor) -> None:
        if target.is_floating_point():
            target.fill_(torch.nan)  # whoever reads it now will show it
        self.targets.add(target.data_ptr())
        self.sent += source.nbytes
        self.under_way.append((target, source))

    def join(self) -> None:
        self.fail_at -= 1
        if self.fail_at == 0:
            raise RuntimeError("CUDA error: injected")
        for target, source in self.under_way:
            target.copy_(source)
        self.under_way.clear()


class Early(Late):
    """One that copies as early as it may: at once, over what the buffer held before."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)
        self.targets.add(target.data_ptr())
        self.sent += source.nbytes


class Streams:
    """Stands in for CUDA in group offloading while a test runs.

    diffusers' hooks run as they are, in the form that CUDA gets. What is brought to the device
    becomes a copy, so that a write on the host after that does not reach it; and only page-locked
    memory is brought as it is, where the hooks else make a page-locked copy, as torch does.

    Attributes:
        locked: page-locked pieces of memory.
        on_device: bytes that are on the device now, by the parameter that holds them.
        most: bytes that were there at most at one time.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.locked: dict[int, Tensor] = {}
        self.on_device: dict[int, int] = {}
        self.most = 0
        self._patch_torch(monkeypatch)
        self._patch_hooks(monkeypatch)
        monkeypatch.setattr("flux.memory.offload.Arena", lambda **_: Arena(pinned=True))

    def lock(self, tensor: Tensor) -> Tensor:
        self.locked[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def is_locked(self, tensor: Tensor) -> bool:
        if isinstance(tensor, Float8Tensor):
            return self.is_locked(tensor.qdata) and self.is_locked(tensor.scale)
        return tensor.untyped_storage().data_ptr() in self.locked

    def lock_copy(self, tensor: Tensor) -> Tensor:
        """As `Tensor.pin_memory`: the tensor itself where it is page-locked as a whole."""
        if self.is_locked(tensor):
            return tensor
        if isinstance(tensor, Float8Tensor):
            return torch.ops.aten._pin_memory(tensor)  # its class's own
        return self.lock(tensor.clone())

    def _patch_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        empty = torch.empty

        def empty_or_locked(*shape: Any, pin_memory: bool = False, **options: Any) -> Tensor:
            found = empty(*shape, **options)
            return self.lock(found) if pin_memory else found

        monkeypatch.setattr(torch, "empty", empty_or_locked)
        monkeypatch.setattr(torch.Tensor, "is_pinned", self_of(self.is_locked))
        monkeypatch.setattr(torch.Tensor, "pin_memory", self_of(self.lock_copy))
        monkeypatch.setattr(torch.cpu.Stream, "synchronize", lambda _: None, raising=False)

    def _patch_hooks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        group = group_offloading.ModuleGroup
        prefetch, take_back = group._transfer_tensor_to_device, group._offload_to_memory

        def bring_a_copy(group: Any, tensor: Tensor, source: Tensor, stream: Any) -> None:
            prefetch(group, tensor, source.clone(), stream)
            self.on_device[id(tensor)] = tensor.numel() * tensor.element_size()
            self.most = max(self.most, sum(self.on_device.values()))

        def forget(group: Any) -> None:
            take_back(group)
            held = [p for module in group.modules for p in module.parameters()]
            for parameter in (*held, *group.parameters):
                self.on_device.pop(id(parameter), None)

        def apply(module: torch.nn.Module, *, use_stream: bool, **options: Any) -> None:
            kind = group_offloading.GroupOffloadingType(options.pop("offload_type"))
            config = group_offloading.GroupOffloadingConfig(
                **options,
                offload_type=kind,
                non_blocking=False,
                record_stream=False,
                low_cpu_mem_usage=False,
                stream=torch.cpu.Stream(),
            )
            group_offloading._apply_group_offloading(module, config)

        monkeypatch.setattr(group, "_transfer_tensor_to_device", bring_a_copy)
        monkeypatch.setattr(group, "_offload_to_memory", forget)
        monkeypatch.setattr("flux.memory.offload.apply_group_offloading", apply)


def self_of(function: Any) -> Any:
    """A method that calls a function of the instance alone."""
    return lambda tensor, *_: function(tensor)
