"""Which weights are on the device: a decision over declared sizes and a budget.

FLUX.1 dev and schnell in both precisions are 71.5 GB beside 9.9 GB of text encoders and VAE, which
does not fit on an 80 GB card beside activations. This module decides what is on the device, by pure
logic over names and bytes; `flux.transformers.pool` acts on it. A transformer that is not on the
device is not kept elsewhere. It is made again from the variant's base weights on the host, in the
same pass that merges the request's adapters, or from its float8 weights on disk if there are any.

A copy of a variant's base weights can be on the device too. It has a size like a transformer,
and is loaded and evicted in the same way, by least recent use. docs/memory.md says why dev's come
before schnell. No request is refused because of them, because the host has them too.
"""

import math
from collections.abc import Collection, Mapping
from typing import Literal, NamedTuple

from flux.variants import Key, Precision
from weights.serving.settings import GB

BASE: Literal["base weights"] = "base weights"


class BaseCopy(NamedTuple):
    """The base weights of a variant, on the device."""

    variant: str
    form: Literal["base weights"] = BASE


Item = Key | BaseCopy
"""What takes device memory."""
Memory = Literal["device", "host"]
"""The memory that a budget is for."""

START: tuple[Item, ...] = (
    Key("dev", "bf16"),
    Key("dev", "fp8"),
    BaseCopy("dev"),
    Key("schnell", "fp8"),
    Key("schnell", "bf16"),
    BaseCopy("schnell"),
)
"""What is loaded to the device when the server starts, in this order."""
ORDER = tuple(item for item in START if isinstance(item, Key))
"""The transformers among them."""
REMEDIES: Mapping[Memory, str] = {
    "device": "a larger device or FLUX_OFFLOAD",
    "host": "a host with more memory",
}


class BudgetError(RuntimeError):
    """Weights take more memory than there is. The message says what to do."""


class Residency:
    """What is on the device; the least recently used is evicted first.

    Args:
        sizes: bytes of each thing that may be there.
        budget: bytes that they may take together; None: as many as there are.
        place: where that is, for messages.
    """

    def __init__(
        self, sizes: Mapping[Item, int], budget: int | None, place: Memory = "device"
    ) -> None:
        self._place = place
        self.sizes = dict(sizes)
        self._budget = math.inf if budget is None else budget
        self._resident: list[Item] = []  # the least recently used first

    @property
    def resident(self) -> tuple[Item, ...]:
        """What is on the device, the least recently used first."""
        return tuple(self._resident)

    @property
    def used(self) -> int:
        """Bytes on the device."""
        return sum(self.sizes[key] for key in self._resident)

    def at_start(self, precisions: Collection[Precision] = ("bf16", "fp8")) -> list[Item]:
        """What to bring to an empty device, the most wanted last, so that it stays longest.

        Args:
            precisions: of transformers, these alone; base weights where bf16 is among them,
                for they are read then anyway.

        Raises:
            BudgetError: no transformer fits.
        """
        forms = {*precisions, *((BASE,) if "bf16" in precisions else ())}
        wanted = [item for item in START if item in self.sizes and item[1] in forms]
        found, left = [], self._budget
        for item in wanted:  # those that exceed what is left are skipped
            if self.sizes[item] <= left:
                found.append(item)
                left -= self.sizes[item]
        if not found:  # base weights take no less than bf16, which comes before them
            self._check(min(wanted, key=self.sizes.__getitem__))
        return found[::-1]

    def fits_beside(self, item: Item, key: Key) -> bool:
        """Whether both fit together, if everything else is evicted."""
        return self.sizes[item] + self.sizes[key] <= self._budget

    def admit(self, key: Item) -> list[Item]:
        """Count something as on the device and used just now.

        Returns:
            what must be evicted before it is loaded; nothing if it is on the device already.

        Raises:
            BudgetError: it does not fit even alone; nothing has changed then.
        """
        self._check(key)
        leaving: list[Item] = []
        if key in self._resident:
            self._resident.remove(key)
        while self.used + self.sizes[key] > self._budget:
            leaving.append(self._resident.pop(0))
        self._resident.append(key)
        return leaving

    def drop(self, key: Item) -> None:
        """Count something as not on the device."""
        if key in self._resident:
            self._resident.remove(key)

    def exclude(self, item: Item) -> bool:
        """Forget an item and its size: it is never admitted again; return whether it could be."""
        self.drop(item)
        return self.sizes.pop(item, None) is not None

    def _check(self, key: Item) -> None:
        if self.sizes[key] > self._budget:
            raise BudgetError(
                f"{' '.join(key)} takes {self.sizes[key] / GB:.2f} GB, and the {self._place} "
                f"has {max(0, self._budget) / GB:.2f} GB for transformers: use the other precision "
                f"or {REMEDIES[self._place]}, or raise FLUX_{self._place.upper()}_MEMORY_GB if it "
                "is set too low"
            )
