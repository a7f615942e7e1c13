"""Which transformers are on the device: a decision over declared sizes and a budget.

FLUX.1 dev and schnell in both precisions are 71.7 GB beside 9.9 GB of text encoders and VAE, which
no 80 GB card holds beside activations. So what is on the device is decided here, by pure logic over
names and bytes; `flux.transformers` does what it says. A transformer that is not on the device
is not anywhere: it is made from the variant's pristine weights on the host, in the one pass that
writes the request's adapters too, or from its float8 weights on disk where there are any. Quantized
copies on the host were refused: making them anew reads no more than the merge of an adapter does.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Literal, TypeVar

from flux.request import Precision
from weights.inventory import GB

Key = tuple[str, Precision]
"""(variant, precision)."""
Place = Literal["device", "host"]
"""Whose memory a budget is of."""
T = TypeVar("T")

ORDER: tuple[Key, ...] = (("dev", "bf16"), ("dev", "fp8"), ("schnell", "fp8"), ("schnell", "bf16"))
"""Which come to the device first when the server starts."""
REMEDIES: Mapping[Place, str] = {
    "device": "a larger device or FLUX_OFFLOAD",
    "host": "a host with more memory",
}


class BudgetError(RuntimeError):
    """What is asked for takes more memory than there is; the message says what to do."""


def that_fit(order: Iterable[T], sizes: Mapping[T, int], budget: int | None) -> list[T]:
    """The items that fit into a budget together, each taken, in order, if it still fits."""
    found: list[T] = []
    left = budget
    for item in order:
        if left is None:
            found.append(item)
        elif sizes[item] <= left:
            found.append(item)
            left -= sizes[item]
    return found


class Residency:
    """What is on the device; the least recently used makes room.

    Args:
        sizes: bytes of each transformer.
        budget: bytes that they may take together; None: as many as there are.
        place: where that is, for messages.
    """

    def __init__(
        self, sizes: Mapping[Key, int], budget: int | None, place: Place = "device"
    ) -> None:
        self._place = place
        self.sizes = sizes
        self._budget = budget
        self._resident: list[Key] = []  # the least recently used first

    @property
    def resident(self) -> tuple[Key, ...]:
        """What is on the device, the least recently used first."""
        return tuple(self._resident)

    @property
    def used(self) -> int:
        """Bytes on the device."""
        return sum(self.sizes[key] for key in self._resident)

    def at_start(self, precisions: Collection[Precision] = ("bf16", "fp8")) -> list[Key]:
        """What to bring to an empty device, the most wanted last, so that it stays longest.

        Args:
            precisions: of these alone.

        Raises:
            BudgetError: none of them fits.
        """
        wanted = [key for key in ORDER if key in self.sizes and key[1] in precisions]
        found = that_fit(wanted, self.sizes, self._budget)
        if not found:
            self._check(min(wanted, key=self.sizes.__getitem__))
        return found[::-1]

    def admit(self, key: Key) -> list[Key]:
        """Count a transformer as on the device and used just now.

        Returns:
            what must leave the device before it comes; none where it is there already.

        Raises:
            BudgetError: it does not fit even alone; nothing has changed then.
        """
        self._check(key)
        leaving: list[Key] = []
        if key in self._resident:
            self._resident.remove(key)
        while self._budget is not None and self.used + self.sizes[key] > self._budget:
            leaving.append(self._resident.pop(0))
        self._resident.append(key)
        return leaving

    def drop(self, key: Key) -> None:
        """Count a transformer as not on the device."""
        if key in self._resident:
            self._resident.remove(key)

    def _check(self, key: Key) -> None:
        if self._budget is not None and self.sizes[key] > self._budget:
            raise BudgetError(
                f"{' '.join(key)} takes {self.sizes[key] / GB:.2f} GB, and the {self._place} "
                f"has {max(0, self._budget) / GB:.2f} GB for transformers: use the other precision "
                f"or {REMEDIES[self._place]}, or raise FLUX_{self._place.upper()}_MEMORY_GB if it "
                "is set too low"
            )
