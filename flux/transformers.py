"""The transformers that serve: dev and schnell, each in bf16 and in fp8.

Each variant has one pristine copy on the host (flux/masters.py), which nobody writes. What serves
is made from it in working weights of its own: memory on the device, every record UNKNOWN, and a
reconciliation, which writes pristine values and adapters in one pass, fp8 weight by weight. While
the pristine copy is not open, fp8 comes from its file instead (flux/prequantized.py), every record
pristine, and the reconciliation opens the copy for what adapters touch, and only then. Leaving
the device drops the working weights together with their records, so no record can outlive what it
describes. The module objects stay, and with them the pipelines.
"""

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from flux.masters import Master
from flux.merge import AdapterLike, Pristine, Swap, WorkingWeights
from flux.quantize import empty_float8, float8_parameters, storage, store
from flux.request import Precision
from flux.residency import ORDER, BudgetError, Key, Residency
from weights.inventory import Entry, size_of

logger = logging.getLogger(__name__)

T = TypeVar("T")
COMPONENT = "transformer"


class Transformers:
    """Brings transformers to the device with the adapters that a request wants.

    Args:
        masters: variant -> pristine transformer, in the compute dtype.
        device: where the working weights are.
        dynamic: whether fp8 linears quantize their inputs too.
        budget: bytes of the device for working weights; None: no limit.
        precisions: of what is on the device at the start.
    """

    def __init__(
        self,
        masters: Mapping[str, Master],
        device: torch.device,
        *,
        dynamic: bool,
        budget: int | None,
        precisions: Collection[Precision] = ("bf16", "fp8"),
    ) -> None:
        self._masters = masters
        self._device = device
        self._dynamic = dynamic
        self.modules: dict[Key, nn.Module] = {
            key: skeleton(masters[key[0]].template) for key in ORDER
        }
        self._float8 = {
            key: float8_parameters(module) if key[1] == "fp8" else frozenset()
            for key, module in self.modules.items()
        }
        self._weights: dict[Key, WorkingWeights] = {}
        sizes = {key: size(self.modules[key], self._float8[key]) for key in ORDER}
        self._residency = Residency(sizes, budget)
        self._seconds: dict[Key, float] = {}  # that coming to the device took
        self._sources: dict[Key, str] = {}  # what it was made from
        self.at_start: Sequence[Key] = self._residency.at_start(precisions)

    @property
    def resident(self) -> tuple[Key, ...]:
        """What is on the device, the least recently used first."""
        return self._residency.resident

    def reconcile(
        self,
        key: Key,
        adapters: Sequence[tuple[AdapterLike, float]],
        check_cancelled: Callable[[], None] = lambda: None,
    ) -> Swap:
        """Have a transformer on the device, with these adapters in it and nothing else.

        Raises:
            BudgetError: there is not enough memory for it.
        """

        def write() -> Swap:
            start = time.perf_counter()
            for other in self._residency.admit(key):
                self._evict(other)
            fresh = key not in self._weights
            if fresh:
                logger.info("Loading %s %s", *key)
                self._bring(key, check_cancelled)
            swap = self._weights[key].reconcile(adapters, check_cancelled)
            if not fresh:
                return swap
            self._seconds[key] = time.perf_counter() - start
            logger.info("%s %s is on %s: %s", *key, self._device, self._entry(key).cost)
            return replace(swap, restored=0)  # they were never anything else

        return self.with_room(key, write)

    def with_room(self, key: Key, work: Callable[[], T]) -> T:
        """Do some work; where the device's memory does not suffice, alone with one transformer.

        Raises:
            BudgetError: it does not suffice then either.
        """
        try:
            return work()
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            logger.warning("Out of memory on %s, trying again with less there", self._device)
            logger.warning("%s", error)
        for other in self.resident:  # out of the except block, which holds on to tensors
            if other != key:
                self._evict(other)
        _empty_cache(self._device)
        try:
            return work()
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            raise BudgetError(
                f"Out of memory on {self._device}, also with {' '.join(key)} alone there: ask for "
                "a smaller image or fewer megapixels, or use a larger device"
            ) from error

    def entries(self) -> list[Entry]:
        """Rows for the table of setup: the pristine transformers, and those that serve."""
        found = [master.entry() for master in self._masters.values()]
        return found + [self._entry(key) for key in ORDER]

    def _entry(self, key: Key) -> Entry:
        name, size = " ".join(key), self._residency.sizes[key]
        if key not in self._weights:
            return Entry.later(name, size, "with its first request")
        held = [t for value in self.modules[key].parameters() for t in storage(value)]
        return Entry.of(name, held, self._sources[key], self._seconds[key])

    def _bring(self, key: Key, check_cancelled: Callable[[], None]) -> None:
        """Memory on the device for a transformer, and records of what is in it.

        That is nothing yet, or its prequantized weights, where they save opening the pristine.
        """
        module, float8, master = self.modules[key], self._float8[key], self._masters[key[0]]
        ready_made = None if key[1] == "bf16" or master.is_open else master.prequantized
        try:
            for name, parameter in list(module.named_parameters()):
                if name in float8:
                    value: Tensor = empty_float8(
                        parameter.shape, parameter.dtype, self._device, dynamic=self._dynamic
                    )
                else:
                    value = torch.empty_like(parameter, device=self._device)
                _set(module, name, value)
            if ready_made:
                ready_made.fill(module, check_cancelled)
            self._sources[key] = str(ready_made.path) if ready_made else f"{key[0]} pristine"
            self._weights[key] = WorkingWeights(
                {COMPONENT: module}, self._pristine(key[0]), store, blank=not ready_made
            )
        except BaseException:
            self._evict(key)
            raise

    def _evict(self, key: Key) -> None:
        """Give back a transformer's memory; its records go with it."""
        if self._weights.pop(key, None):
            logger.info("%s %s leaves %s", *key, self._device)
        self._residency.drop(key)
        module = self.modules[key]
        for name, parameter in list(module.named_parameters()):
            _set(module, name, torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"))

    def _pristine(self, variant: str) -> Pristine:
        """A variant's pristine values: from the device where they are there, else the host's."""
        key: Key = (variant, "bf16")

        def read(component: str, name: str) -> Tensor:
            weights = self._weights.get(key)
            if weights is not None and weights.record(component, name) == ():
                return self.modules[key].get_parameter(name)
            return self._masters[variant].open()[name]

        return read


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Also cuBLAS' and cuDNN's own failures to allocate, which have no class of their own."""
    return isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error)


def skeleton(master: nn.Module) -> nn.Module:
    """A module like `master`, with parameters of its shapes and dtype, and no memory."""
    with torch.device("meta"):
        module: nn.Module = type(master).from_config(master.config)  # type: ignore[attr-defined]
    for name, parameter in master.named_parameters():
        _set(module, name, torch.empty_like(parameter, device="meta"))
    return module.eval()


def size(module: nn.Module, float8: frozenset[str]) -> int:
    """Bytes of a transformer's weights with some of them in float8, a scale for each row."""
    return sum(
        parameter.numel() + 4 * parameter.shape[0] if name in float8 else size_of([parameter])
        for name, parameter in module.named_parameters()
    )


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def _empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
