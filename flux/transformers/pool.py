"""The transformers that serve: dev and schnell, each in bf16 and in fp8.

Each variant has one base copy on the host (flux/transformers/base_weights.py), which nobody writes,
and another on the device if there is room for it (flux/transformers/copies.py). What serves is made
from it in working weights of its own: memory on the device, every record UNKNOWN, and a
reconciliation, which writes base values and adapters in one pass, fp8 weight by weight. For a small
card, that memory is on the host (flux/memory/offload.py), where all else is the same. While the
base copy is not open, fp8 comes from its file instead (flux/transformers/prequantized.py), every
record empty, and the reconciliation opens the copy for what adapters touch, and only then. Leaving
the device drops the working weights together with their records, so no record can outlive what it
describes. The module objects stay, and with them the pipelines.
"""

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from flux.components import TRANSFORMER
from flux.memory.device import empty_cache, is_out_of_memory
from flux.memory.offload import Empty, Placement
from flux.memory.residency import ORDER, BaseCopy, BudgetError, Item, Residency
from flux.memory.staging import Staging
from flux.transformers.adapters import AdapterLike
from flux.transformers.base_weights import BaseWeights
from flux.transformers.copies import DeviceCopies, Plain
from flux.transformers.float8 import FLOAT8, empty_float8, float8_parameters, storage
from flux.transformers.merge import Swap, WorkingWeights
from flux.transformers.one_pass import OnePass
from flux.transformers.skeleton import allocate, size, skeleton
from flux.variants import Key, Precision
from weights.serving.cancel import CheckCancelled, never_cancelled
from weights.serving.inventory import Entry

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Transformers:
    """Brings transformers to the device with the adapters that a request wants.

    Args:
        base_weights: variant -> base transformer, in the compute dtype.
        device: where they compute.
        dynamic: whether fp8 linears quantize their inputs too.
        budget: bytes for working weights, in the memory that `placement` names; None: no limit.
        placement: where the working weights are; by default on the device.
        precisions: of what is there at the start.
        one_pass: writes weights with adapters there; None: torch's operators do.
    """

    def __init__(
        self,
        base_weights: Mapping[str, BaseWeights],
        device: torch.device,
        *,
        dynamic: bool,
        budget: int | None,
        placement: Placement | None = None,
        precisions: Collection[Precision] = ("bf16", "fp8"),
        one_pass: OnePass | None = None,
    ) -> None:
        self.precisions = precisions
        self._base_weights = base_weights
        self._device = device
        self._dynamic = dynamic
        self._one_pass = one_pass
        self._placement = placement or Placement(device)
        self._staging = Staging(self._placement.memory, self._placement.stream)
        self.modules: dict[Key, nn.Module] = {
            key: skeleton(base_weights[key.variant].skeleton, joined=self._placement.joins)
            for key in ORDER
        }
        self._float8 = {
            key: float8_parameters(module) if key.precision == "fp8" else frozenset()
            for key, module in self.modules.items()
        }
        self._weights: dict[Key, WorkingWeights] = {}
        self._seconds: dict[Key, float] = {}  # that making them took
        self._sources: dict[Key, object] = {}  # what they were made from
        sizes: dict[Item, int] = {k: size(self.modules[k], self._float8[k]) for k in ORDER}
        if self._placement.stream and self._placement.shares_device:  # else nothing is copied there
            sizes |= {BaseCopy(name): sizes[Key(name, "bf16")] for name in base_weights}
        shares = self._placement.shares_device
        self._residency = Residency(sizes, budget, "device" if shares else "host")
        at_start = self._residency.at_start(precisions)
        self.at_start: Sequence[Key] = [k for k in ORDER[::-1] if k in at_start]
        copied = {item.variant for item in at_start if isinstance(item, BaseCopy)}
        self._copies = DeviceCopies(base_weights, self._placement.memory, self._staging, copied)

    @property
    def resident(self) -> tuple[Key, ...]:
        """The transformers on the device, the least recently used first."""
        return tuple(k for k in self._residency.resident if isinstance(k, Key))

    def warm_up(self) -> None:
        """Compile what merges adapters, so that no request waits for it."""
        if self._one_pass:
            self._one_pass.warm_up(next(self.modules[ORDER[0]].parameters()).dtype)

    def reconcile(
        self,
        key: Key,
        adapters: Sequence[tuple[AdapterLike, float]],
        check_cancelled: CheckCancelled = never_cancelled,
    ) -> Swap:
        """Have a transformer on the device, with these adapters in it and nothing else.

        Raises:
            BudgetError: there is not enough memory for it.
        """

        def write() -> Swap:
            start = time.perf_counter()
            self._make_room(self._residency.admit(key))
            fresh = key not in self._seconds  # or never finished: memory may have run out
            if key not in self._weights:
                logger.info("Loading %s %s", *key)
                self._load(key, check_cancelled)
            if self._wants_copy(key, adapters, fresh=fresh):
                self._copy_base(key.variant, check_cancelled)
            swap = self._weights[key].reconcile(adapters, check_cancelled)
            if not fresh:
                return swap
            self._seconds[key] = time.perf_counter() - start
            logger.info("%s %s is on %s: %s", *key, self._placement.memory, self._entry(key).cost)
            return replace(swap, restored=0)  # they were never anything else

        def write_alone() -> Swap:  # the device has less memory than its budget says
            if self._residency.exclude(BaseCopy(key.variant)):
                logger.warning("%s base weights stay on the host until the next start", key.variant)
            self._copies.settle(key.variant)
            return write()

        return self.with_room(key, write, write_alone)

    def with_room(self, key: Key, work: Callable[[], T], alone: Callable[[], T] | None = None) -> T:
        """Do some work; where the device's memory does not suffice, alone with one transformer.

        What is done then is `alone`, by default the same.

        Raises:
            BudgetError: it does not suffice then either.
        """
        try:
            return work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("Out of memory on %s, trying with less: %s", self._device, error)
        return self._alone(key, alone or work)  # not within `except`: the error holds tensors

    def _alone(self, key: Key, work: Callable[[], T]) -> T:
        """Do some work with one transformer alone on the device."""
        for other in self._residency.resident:
            if other != key and self._placement.shares_device:
                self._evict(other)
        if self._one_pass:
            self._one_pass.forget()
        empty_cache(self._device)
        try:
            return work()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise BudgetError(
                f"Out of memory on {self._device}, also with {' '.join(key)} alone there: ask for "
                "a smaller image or fewer megapixels, or use a larger device"
            ) from error

    def entries(self) -> list[Entry]:
        """Rows for the table of setup: the base transformers, and those that serve."""
        found = [base.entry() for base in self._base_weights.values()]
        return found + self._copies.entries() + [self._entry(key) for key in ORDER]

    def _entry(self, key: Key) -> Entry:
        name, size = " ".join(key), self._residency.sizes[key]
        if key not in self._weights:
            return Entry.later(name, size, "with its first request")
        held = [t for value in self.modules[key].parameters() for t in storage(value)]
        return Entry.of(name, held, self._sources[key], self._seconds[key])

    def _load(self, key: Key, check_cancelled: CheckCancelled) -> None:
        """Memory for a transformer, and records of what is in it.

        That is nothing yet, or its prequantized weights, where they save reading the base weights.
        """
        module, empty = self.modules[key], self._placement.allocator()
        base = self._base_weights[key.variant]
        read_anyway = base.is_open or Key(key.variant, "bf16") in self.at_start
        ready_made = base.prequantized if key.precision == "fp8" and not read_anyway else None
        try:
            allocate(module, partial(self._empty, key, empty))
            if ready_made:  # before the hooks of offloading, which copy the scales
                ready_made.fill(module, self._staging, check_cancelled)
            self._placement.enter(module)
            self._sources[key] = ready_made.path if ready_made else f"{key.variant} base weights"
            self._weights[key] = WorkingWeights(
                {TRANSFORMER: module},
                self._copies.nearest(key.variant, self._plain(key.variant)),
                staging=self._staging,
                one_pass=self._one_pass,
                blank=not ready_made,
            )
        except BaseException:
            self._evict(key)
            raise

    def _empty(
        self, key: Key, empty: Empty, name: str, shape: torch.Size, dtype: torch.dtype
    ) -> Tensor:
        if name not in self._float8[key]:
            return empty(shape, dtype)
        values = empty(shape, FLOAT8)
        make: Callable[..., Tensor] = partial(empty_float8, dynamic=self._dynamic, values=values)
        return make(shape, dtype, values.device)

    def _wants_copy(
        self, key: Key, adapters: Sequence[tuple[AdapterLike, float]], *, fresh: bool
    ) -> bool:
        """Whether the base weights should be on the device before a reconciliation.

        They come with the first transformer that is made of them in setup, and later when adapters
        change. Where the bf16 transformer holds no adapter, it does as well.
        """
        variant = key.variant
        item = BaseCopy(variant)
        if item not in self._residency.sizes or not self._residency.fits_beside(item, key):
            return False
        if self._copies.is_pending(variant):
            return self._weights[key].differs(())  # those of a float8 file are base values
        plain = self._weights.get(Key(variant, "bf16"))
        if fresh or (plain and not plain.differs(())):
            return False
        return self._weights[key].differs(adapters)

    def _copy_base(self, variant: str, check_cancelled: CheckCancelled) -> None:
        """Have a variant's base weights on the device, unless its memory does not suffice."""
        item = BaseCopy(variant)
        self._make_room(self._residency.admit(item))
        if variant in self._copies:
            return
        try:
            self._copies.fill(variant, self._plain(variant), check_cancelled)
        except BaseException as error:
            self._evict(item)
            if not is_out_of_memory(error):
                raise
            logger.warning("The base weights of %s stay on the host: %s", variant, error)
            self._residency.exclude(item)
        finally:
            self._copies.settle(variant)

    def _make_room(self, leaving: Sequence[Item]) -> None:
        """Evict, and give back the blocks, which torch would else split for smaller weights."""
        for key in leaving:
            self._evict(key)
        if leaving:
            empty_cache(self._placement.memory)

    def _evict(self, item: Item) -> None:
        """Give back the memory of a transformer, with its records, or of base weights."""
        self._residency.drop(item)
        if isinstance(item, BaseCopy):
            if self._copies.drop(item.variant):
                logger.info("%s %s leaves %s", *item, self._placement.memory)
            return
        self._seconds.pop(item, None)
        if self._weights.pop(item, None):
            logger.info("%s %s leaves %s", *item, self._placement.memory)
        module = self.modules[item]
        self._placement.leave(module)
        allocate(module, lambda _, shape, dtype: torch.empty(shape, dtype=dtype, device="meta"))

    def _plain(self, variant: str) -> Plain:
        """Gives the weights of a variant's bf16 transformer, if that is on the device."""
        return partial(self._weights.get, Key(variant, "bf16"))
