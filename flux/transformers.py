"""The transformers that serve: dev and schnell, each in bf16 and in fp8.

Each variant has one pristine copy on the host, usually the checkpoint's memory map, which nobody
writes. What serves is made from it in working weights of its own: memory on the device, every
record UNKNOWN, and a reconciliation, which writes pristine values and adapters in one pass, fp8
weight by weight. Leaving the device drops the working weights together with their records,
so no record can outlive what it describes. The module objects stay, and with them the pipelines.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from flux.memory import is_out_of_memory
from flux.merge import AdapterLike, Pristine, Swap, WorkingWeights
from flux.quantize import empty_float8, float8_parameters, storage, store
from flux.residency import GB, ORDER, BudgetError, Key, Residency

logger = logging.getLogger(__name__)

T = TypeVar("T")
COMPONENT = "transformer"


class Transformers:
    """Brings transformers to the device with the adapters that a request wants.

    Args:
        masters: variant -> pristine transformer on the host, in the compute dtype.
        device: where the working weights are.
        dynamic: whether fp8 linears quantize their inputs too.
        budget: bytes of the device for working weights; None: no limit.
    """

    def __init__(
        self,
        masters: Mapping[str, nn.Module],
        device: torch.device,
        *,
        dynamic: bool,
        budget: int | None,
    ) -> None:
        self._masters = {
            variant: dict(master.named_parameters()) for variant, master in masters.items()
        }
        self._device = device
        self._dynamic = dynamic
        self.modules: dict[Key, nn.Module] = {key: skeleton(masters[key[0]]) for key in ORDER}
        self._float8 = {
            key: float8_parameters(module) if key[1] == "fp8" else frozenset()
            for key, module in self.modules.items()
        }
        self._weights: dict[Key, WorkingWeights] = {}
        sizes = {key: size(self.modules[key], self._float8[key]) for key in ORDER}
        self._residency = Residency(sizes, budget)
        self.at_start: Sequence[Key] = self._residency.at_start()

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
                self._bring(key)
            swap = self._weights[key].reconcile(adapters, check_cancelled)
            if not fresh:
                return swap
            seconds = time.perf_counter() - start
            gigabytes = sum(map(_bytes, self.modules[key].parameters())) / GB
            logger.info("%s %s is on %s: %.3f GB in %.1f s", *key, self._device, gigabytes, seconds)
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
            if not is_out_of_memory(error):
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
            if not is_out_of_memory(error):
                raise
            raise BudgetError(
                f"Out of memory on {self._device}, also with {' '.join(key)} alone there: ask for "
                "a smaller image or fewer megapixels, or use a larger device"
            ) from error

    def _bring(self, key: Key) -> None:
        """Memory on the device for a transformer, and records that say nothing is in it yet."""
        module, float8 = self.modules[key], self._float8[key]
        try:
            for name, parameter in list(module.named_parameters()):
                if name in float8:
                    value: Tensor = empty_float8(
                        parameter.shape, parameter.dtype, self._device, dynamic=self._dynamic
                    )
                else:
                    value = torch.empty_like(parameter, device=self._device)
                _set(module, name, value)
            self._weights[key] = WorkingWeights(
                {COMPONENT: module}, self._pristine(key[0]), store, blank=True
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
        masters = self._masters[variant]
        key: Key = (variant, "bf16")

        def read(component: str, name: str) -> Tensor:
            weights = self._weights.get(key)
            if weights is not None and weights.record(component, name) == ():
                return self.modules[key].get_parameter(name)
            return masters[name]

        return read


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
        parameter.numel() + 4 * parameter.shape[0] if name in float8 else _bytes(parameter)
        for name, parameter in module.named_parameters()
    )


def _bytes(parameter: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in storage(parameter))


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def _empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
