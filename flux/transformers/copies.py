"""Where base values are read from: a copy on the device, beside what serves, or the host.

`flux/memory/residency.py` decides which variants have such a copy. It is filled in one pass, from
the device if the values are there already, else from the host. Merging adapters then reads it
instead of the host's weights. What has no copy is page-locked, so that it is read fast; but only
when the copies of setup are made, which would wait for that.
"""

import time
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from flux.components import TRANSFORMER
from flux.memory.staging import Staging
from flux.transformers.adapters import BaseValues
from flux.transformers.base_weights import BaseWeights
from flux.transformers.merge import WorkingWeights
from weights.serving.cancel import CheckCancelled, never_cancelled
from weights.serving.inventory import Entry

Plain = Callable[[], WorkingWeights | None]
"""Gives the weights of a variant's bf16 transformer, if that is on the device."""


class DeviceCopies:
    """Base weights of variants on a device.

    Args:
        base_weights: variant -> those on the host.
        device: whose memory the copies take.
        staging: brings weights there.
        in_setup: the variants whose copies setup makes.
    """

    def __init__(
        self,
        base_weights: Mapping[str, BaseWeights],
        device: torch.device,
        staging: Staging,
        in_setup: Collection[str] = (),
    ) -> None:
        self._base_weights = base_weights
        self._device = device
        self._staging = staging
        self._pending = set(in_setup)
        self._copies: dict[str, dict[str, Tensor]] = {}
        self._seconds: dict[str, float] = {}
        self._begin_page_locking()

    def __contains__(self, variant: str) -> bool:
        """Whether the weights of a variant are there."""
        return variant in self._copies

    def is_pending(self, variant: str) -> bool:
        """Whether setup has still to copy a variant."""
        return variant in self._pending

    def nearest(self, variant: str, plain: Plain) -> BaseValues:
        """Reads base values from the copy, else from a weight without adapters, else from the host.

        Args:
            variant: its name.
            plain: asked for each weight.
        """
        base = self._base_weights[variant]

        def host() -> Mapping[str, Tensor]:
            return base.open() if self._pending else base.at_hand()

        return self._nearest(variant, plain, host)

    def _nearest(
        self, variant: str, plain: Plain, host: Callable[[], Mapping[str, Tensor]]
    ) -> BaseValues:
        def read(component: str, name: str) -> Tensor:
            if copy := self._copies.get(variant):
                return copy[name]
            weights = plain()
            clean = weights.clean(component, name) if weights else None
            return host()[name] if clean is None else clean

        return read

    def fill(
        self, variant: str, plain: Plain, check_cancelled: CheckCancelled = never_cancelled
    ) -> None:
        """Copy the weights of a variant, all or none, each from where it is nearest.

        Args:
            variant: its name.
            plain: asked for each weight.
            check_cancelled: called before each weight is copied; raises to stop.
        """
        start, base = time.perf_counter(), self._base_weights[variant]
        # In setup they are read once: no reason to page-lock. A copy that left may leave again.
        host = base.open if variant in self._pending else base.at_hand
        read = self._nearest(variant, plain, host)
        sources = {name: read(TRANSFORMER, name) for name in host()}
        found = {
            name: torch.empty(source.shape, dtype=source.dtype, device=self._device)
            for name, source in sources.items()
        }
        self._staging.copy(found.values(), sources.values(), check_cancelled)
        self._copies[variant] = found
        self._seconds[variant] = time.perf_counter() - start

    def settle(self, variant: str) -> None:
        """Setup has copied a variant, or will not."""
        if variant in self._pending:
            self._pending.discard(variant)
            self._begin_page_locking()

    def _begin_page_locking(self) -> None:
        """Start to page-lock what will be read from the host; not beside the copies of setup."""
        for variant, base in self._base_weights.items():
            if base.is_open and variant not in self._copies and not self._pending:
                base.begin()

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
