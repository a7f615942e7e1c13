"""Where working weights are at home: on the device, or on the host, from where they visit it.

For cards that are too small, diffusers' group offloading: hooks on every layer bring its
weights to the device before it runs, and while it runs those of the next one, on a stream. Its
copies go one way only, so what a reconciliation writes on the host is what the next forward pass
draws with, provided that the hooks read the very memory that is written. Hence three choices.

- Leaf level. At block level, the layers beside the blocks have no stream, and are moved back
  and forth, to other host memory every time.
- The memory is page-locked in slabs before the hooks come, which then take it as it is; they would
  page-lock a copy of every weight otherwise, half as large again.
- The scales of float8 weights are the exception: a float8 tensor that is page-locked as a whole
  would be its own host copy, which the first visit to the device overwrites (diffusers 0.42.1).
  So they are left in ordinary memory, the hooks page-lock copies, and what is written are the
  parameters as the hooks leave them.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from diffusers.hooks import HookRegistry, apply_group_offloading
from torch import Tensor, nn

from flux.slabs import Slabs
from flux.staging import CopyStream, copy_stream
from weights.settings import SettingsError

Empty = Callable[[Sequence[int], torch.dtype], Tensor]
"""Takes memory for a tensor of a shape and dtype."""

HOOKS = ("layer_execution_tracker", "lazy_prefetch_group_offloading", "group_offloading")
"""What group offloading registers on modules, the last one first."""
COMPONENTS = {
    "none": frozenset[str](),
    "t5": frozenset({"text_encoder_2"}),
    "all": frozenset({"text_encoder_2", "transformer"}),
}
"""FLUX_OFFLOAD -> the components that live on the host."""


def offloaded(setting: str, device: torch.device) -> frozenset[str]:
    """The components that a setting of FLUX_OFFLOAD keeps on the host.

    Raises:
        SettingsError: the device has no streams to bring them on. (On a CPU they need not move.)
    """
    if setting != "none" and device.type not in ("cuda", "cpu"):
        raise SettingsError(
            f"FLUX_OFFLOAD={setting}: {device} cannot copy beside its other work; expected a CUDA "
            "device, or none"
        )
    return COMPONENTS[setting]


def offload(module: nn.Module, device: torch.device) -> None:
    """Make a module run on a device with weights that stay on the host, and come layer by layer.

    Its parameters must be on the host now. They may be in other memory afterwards, and stay there
    between forward passes; during one, and after one that failed, they may be on the device, so
    who wants to write takes `parameter.detach()` before.
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


class Home(Protocol):
    """Where working weights are while no layer runs.

    Attributes:
        memory: the device whose memory they take.
        stream: brings pristine values there.
        shares_device: whether weights that leave make room for what is computed.
    """

    memory: torch.device
    stream: CopyStream | None
    shares_device: bool

    def allocator(self) -> Empty:
        """Takes memory for the weights of one module."""
        ...

    def enter(self, module: nn.Module) -> None:
        """The module's parameters are memory of the allocator's now; make it run."""
        ...

    def leave(self, module: nn.Module) -> None:
        """Undo `enter`, if it was called."""
        ...


class OnDevice:
    """On the device where they are used; `stream` brings pristine values there.

    A CUDA device has a stream of its own for that, and a CPU needs none.
    """

    def __init__(self, device: torch.device, stream: CopyStream | None = None) -> None:
        self.memory = device
        self.stream = stream or copy_stream(device)
        self.shares_device = True

    def allocator(self) -> Empty:
        """See `Home.allocator`."""
        return lambda shape, dtype: torch.empty(shape, dtype=dtype, device=self.memory)

    def enter(self, module: nn.Module) -> None:
        """See `Home.enter`."""

    def leave(self, module: nn.Module) -> None:
        """See `Home.leave`."""


class OnHost:
    """On the host; layer by layer, they visit the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.memory = torch.device("cpu")
        self.stream: CopyStream | None = None
        self.shares_device = False

    def allocator(self) -> Empty:
        """See `Home.allocator`."""
        return Slabs(page_locked=self._device.type == "cuda").empty

    def enter(self, module: nn.Module) -> None:
        """See `Home.enter`."""
        offload(module, self._device)

    def leave(self, module: nn.Module) -> None:
        """See `Home.leave`."""
        stop_offloading(module)
