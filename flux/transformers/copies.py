"""Base weights on the device, beside those that serve.

`flux/memory/residency.py` decides which variants have such a copy. It is filled in one pass, from
the device if the values are there already, else from the host. Merging adapters then reads it
instead of the host's weights.
"""

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from flux.memory.staging import Staging
from flux.transformers.adapters import BaseValues
from flux.transformers.merge import WorkingWeights
from weights.serving.cancel import CheckCancelled, never_cancelled
from weights.serving.inventory import Entry


class DeviceCopies:
    """Base weights of variants on a device.

    Args:
        device: whose memory they take.
        staging: brings weights there.
    """

    def __init__(self, device: torch.device, staging: Staging) -> None:
        self._device = device
        self._staging = staging
        self._copies: dict[str, dict[str, Tensor]] = {}
        self._seconds: dict[str, float] = {}

    def __contains__(self, variant: str) -> bool:
        """Whether the weights of a variant are there."""
        return variant in self._copies

    def nearest(
        self,
        variant: str,
        plain: Callable[[], WorkingWeights | None],
        host: Callable[[], Mapping[str, Tensor]],
    ) -> BaseValues:
        """Reads base values from the copy, else from a weight without adapters, else from the host.

        Args:
            variant: its name.
            plain: gives the weights of the bf16 transformer, if that is on the device.
            host: gives those on the host by name; asked where there is neither.
        """

        def read(component: str, name: str) -> Tensor:
            if copy := self._copies.get(variant):
                return copy[name]
            weights = plain()
            clean = weights.clean(component, name) if weights else None
            return host()[name] if clean is None else clean

        return read

    def fill(
        self,
        variant: str,
        sources: Mapping[str, Tensor],
        check_cancelled: CheckCancelled = never_cancelled,
    ) -> None:
        """Copy the weights of a variant, all or none.

        Args:
            variant: its name.
            sources: each weight where it is nearest, on the device or the host.
            check_cancelled: called before each weight is copied; raises to stop.
        """
        start = time.perf_counter()
        found = {
            name: torch.empty(source.shape, dtype=source.dtype, device=self._device)
            for name, source in sources.items()
        }
        self._staging.copy(found.values(), sources.values(), check_cancelled)
        self._copies[variant] = found
        self._seconds[variant] = time.perf_counter() - start

    def drop(self, variant: str) -> bool:
        """Give back the memory of a variant's weights; return whether there were any."""
        return self._copies.pop(variant, None) is not None

    def entries(self) -> list[Entry]:
        """Rows for the table of setup."""
        return [
            Entry.of(
                f"{name} base copy", held.values(), f"{name} base weights", self._seconds[name]
            )
            for name, held in self._copies.items()
        ]
