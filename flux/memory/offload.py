"""Where working weights are kept: on the device, or on the host with offloading.

Cards that are too small use diffusers' group offloading. Hooks on every layer copy its weights to
the device before it runs, and the next layer's weights while it runs, on a stream. The copies go
from host to device only. So the next forward pass uses what a reconciliation has written on the
host, provided that the hooks read the same memory that is written. Three choices follow.

- Leaf level. At block level, the layers outside the blocks have no stream, and are moved back and
  forth, to new host memory every time.
- The memory is page-locked in chunks before the hooks are installed, and the hooks use it as it is.
  Otherwise they would page-lock a copy of every weight, half as large again.
- The scales of float8 weights are the exception. A float8 tensor that is page-locked as a whole
  would be its own host copy, and the first transfer to the device overwrites it (diffusers 0.42.1).
  So the scales stay in ordinary memory, the hooks page-lock copies of them, and reconciliations
  write the parameters that the hooks have installed.
"""

import gc
from collections.abc import Callable, Mapping, Sequence

import torch
from diffusers.hooks import HookRegistry, apply_group_offloading
from torch import Tensor, nn

from flux.memory.pinned import Arena
from flux.memory.staging import CopyStream, copy_stream
from weights.serving.settings import Offload, SettingsError

Empty = Callable[[Sequence[int], torch.dtype], Tensor]
"""Allocates an uninitialised tensor of a shape and dtype."""

HOOKS = ("layer_execution_tracker", "lazy_prefetch_group_offloading", "group_offloading")
"""What group offloading registers on modules, the last one first."""
COMPONENTS: Mapping[Offload, frozenset[str]] = {
    "none": frozenset[str](),
    "t5": frozenset({"text_encoder_2"}),
    "all": frozenset({"text_encoder_2", "transformer"}),
}
"""FLUX_OFFLOAD -> the components that live on the host."""


def offloaded(setting: Offload, device: torch.device) -> frozenset[str]:
    """The components that a setting of FLUX_OFFLOAD keeps on the host.

    Raises:
        SettingsError: the device has no streams for the copies. (On a CPU nothing is copied.)
    """
    if setting != "none" and device.type not in ("cuda", "cpu"):
        raise SettingsError(
            f"FLUX_OFFLOAD={setting}: {device} cannot copy beside its other work; expected a CUDA "
            "device, or none"
        )
    return COMPONENTS[setting]


def offload(module: nn.Module, device: torch.device) -> None:
    """Make a module run on a device with weights that stay on the host.

    Its parameters must be on the host now. Afterwards they may be in other memory, and stay there
    between forward passes. During a forward pass, and after one that failed, they may be on the
    device; code that writes them must take `parameter.detach()` beforehand.
    """
    apply_group_offloading(
        module,
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
        use_stream=device.type == "cuda",
    )


def stop_offloading(module: nn.Module) -> None:
    """Undo `offload`; the parameters are left wherever they are."""
    registry = HookRegistry.check_if_exists_or_initialize(module)
    for name in HOOKS:
        registry.remove_hook(name, recurse=True)


class Placement:
    """Where working weights are between forward passes: here, on the device that computes.

    Attributes:
        memory: the device whose memory they take.
        stream: copies base values there; None where it has no stream, as a CPU.
        shares_device: whether they share memory with activations.
        joins: whether weights may share a tensor (flux/transformers/projections.py); the hooks of
            offloading move them one by one.
    """

    shares_device = True
    joins = True

    def __init__(self, device: torch.device, stream: CopyStream | None = None) -> None:
        self.memory = device
        self.stream = stream or copy_stream(device)

    def allocator(self) -> Empty:
        """Return a function that allocates the weights of one module."""
        return lambda shape, dtype: torch.empty(shape, dtype=dtype, device=self.memory)

    def enter(self, module: nn.Module) -> None:
        """Prepare a module for forward passes; its parameters are in the allocator's memory now."""

    def leave(self, module: nn.Module) -> None:
        """Undo `enter` if it was called."""


class OnHost(Placement):
    """On the host; layers are copied to the device while they run."""

    shares_device = joins = False

    def __init__(self, device: torch.device) -> None:
        super().__init__(torch.device("cpu"))
        self._device = device

    def allocator(self) -> Empty:
        """Of page-locked memory with CUDA."""
        return Arena(pinned=self._device.type == "cuda").empty

    def enter(self, module: nn.Module) -> None:
        """Install the hooks of offloading."""
        offload(module, self._device)

    def leave(self, module: nn.Module) -> None:
        """Remove the hooks.

        They hold the page-locked weights and refer to each other, so only the collector frees
        them; and what comes next takes as much.
        """
        stop_offloading(module)
        gc.collect()
