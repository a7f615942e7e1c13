"""The types that merging knows adapters by; those of `lora` fit them without importing them."""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

ParameterName = tuple[str, str]
"""(component, parameter name as in the component's `named_parameters()`)."""

MergeRecord = tuple[tuple[str, float], ...]
"""What a working value contains: (adapter digest, scale), sorted; empty for the base value."""

BaseValues = Callable[[str, str], Tensor]
"""(component, parameter name) -> base value, in the working dtype or a finer one."""

LowRank = tuple[Tensor, Tensor, float, slice]
"""A LoRA delta of some rows of a weight: up [rows, rank], down [rank, columns], scaling, rows."""


class AdapterLike(Protocol):
    """What merging needs of an adapter."""

    @property
    def digest(self) -> str:
        """Identity: two adapters of one digest add the same."""
        ...

    @property
    def parameters(self) -> Set[ParameterName]:
        """Every parameter that `add_to` accepts."""
        ...

    def add_to(
        self, total: Tensor, component: str, parameter: str, base: BaseValues, scale: float
    ) -> None:
        """Add `scale * delta` of one parameter to `total` (fp32, its shape) in place."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all that it holds."""
        ...

    def low_rank(self, component: str, parameter: str) -> Sequence[LowRank] | None:
        """The delta of one parameter as a sum of LoRA deltas; None where it is none."""
        ...

    def placed(
        self, parameters: Set[ParameterName], send: Callable[[Tensor], Tensor]
    ) -> "AdapterLike":
        """The same for some of its parameters only, with tensors that `send` gives."""
        ...


@dataclass(frozen=True, slots=True)
class DeviceAdapters:
    """Adapters on the device.

    Attributes:
        factors: for weights that get LoRA deltas only, (up, down, scales), see `OnePass.write`.
        adapters: by digest, for all others.
    """

    factors: Mapping[ParameterName, tuple[Tensor, Tensor, Tensor]]
    adapters: Mapping[str, AdapterLike]
