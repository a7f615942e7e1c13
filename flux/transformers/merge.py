"""Adapters in the working weights, by reconciliation.

Every parameter has a record of what its working value contains. `reconcile` compares the
records with what is wanted and writes only the parameters that differ, each from its base
value: `working = round(base + sum of scale * delta)`. Nothing is ever subtracted: a weight without
adapters is made of the base weight alone, so rounding errors cannot add up. A merge that fails
half-way leaves records that tell so, and the next reconcile heals it.

Here a write is torch's operators, one pass each. On CUDA `flux/transformers/one_pass.py` does the
same in one, for plain LoRA deltas, and for float8 weights whose adapters leave.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flux.memory.staging import Staging
from flux.transformers.adapters import (
    AdapterLike,
    BaseValues,
    DeviceAdapters,
    MergeRecord,
    ParameterName,
)
from flux.transformers.float8 import store
from weights.serving.cancel import CheckCancelled, never_cancelled
from weights.serving.lru import LruCache

if TYPE_CHECKING:
    from flux.transformers.one_pass import OnePass

Store = Callable[[Tensor, Tensor], None]
"""Writes an exact value (fp32, or the base weight itself) into a working weight in place."""


PLANS = 8  # combinations of adapters and scales whose records are kept
UNKNOWN = None
"""The record of a parameter before its first write, while it is written, and if that fails."""


@dataclass(frozen=True, slots=True)
class Swap:
    """What one reconciliation did.

    Attributes:
        merged: how many parameters were written with adapters in them.
        restored: how many got their base values back.
        absent: parameters that an adapter changes and these modules do not have (the guidance
            embedder of dev, in schnell), left out.
    """

    merged: int
    restored: int
    absent: tuple[ParameterName, ...]


class ClonedBaseValues:
    """The default source of base values: a host copy of each parameter, before its first write.

    Costs the host's memory of every parameter that an adapter ever touched. A loader that keeps a
    second mapping of the files, or page-locked memory, gives a function of its own instead.
    """

    def __init__(self, parameters: Mapping[ParameterName, Tensor]) -> None:
        self._parameters = parameters
        self._copies: dict[ParameterName, Tensor] = {}

    def __call__(self, component: str, parameter: str) -> Tensor:
        """The base value; the first call for a parameter must precede its first write."""
        key = (component, parameter)
        if key not in self._copies:
            self._copies[key] = self._parameters[key].detach().to("cpu", copy=True)
        return self._copies[key]


class WorkingWeights:
    """The parameters that serve, and the record of what each contains.

    Args:
        modules: "transformer", "text_encoder", "text_encoder_2" -> module. Their parameters
            must hold their base values now, unless blank, and nobody else may write them.
        base: where base values come from; by default a copy before the first write.
        store: how a result is put into a working weight.
        staging: brings base values to the device; by default they are used where they are.
        one_pass: writes weights with LoRA deltas, and restores float8 ones; None: torch's operators
            do, as for all others.
        blank: the parameters hold nothing yet; the first reconciliation writes all of them.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        base: BaseValues | None = None,
        store: Store = store,
        staging: Staging | None = None,
        *,
        one_pass: "OnePass | None" = None,
        blank: bool = False,
    ) -> None:
        self._parameters: dict[ParameterName, Tensor] = {
            (component, name): parameter.detach()  # the memory, wherever hooks send the parameter
            for component, module in modules.items()
            for name, parameter in module.named_parameters()
        }
        self._base = base or ClonedBaseValues(self._parameters)
        self._store = store
        self._staging = staging or Staging(torch.device("cpu"), stream=None)
        self._one_pass = one_pass
        self._plans: LruCache[MergeRecord, Mapping[ParameterName, MergeRecord]] = LruCache(PLANS)
        self._records: dict[ParameterName, MergeRecord | None] = {}
        if blank:
            self._records |= dict.fromkeys(self._parameters, UNKNOWN)
        self._scratch = torch.empty(0)

    def record(self, component: str, parameter: str) -> MergeRecord | None:
        """What a parameter's working value contains; UNKNOWN after a write that failed."""
        return self._records.get((component, parameter), ())

    def clean(self, component: str, parameter: str) -> Tensor | None:
        """The working value, where that is the base value."""
        clean = self.record(component, parameter) == ()
        return self._parameters[component, parameter] if clean else None

    def fingerprint(self, component: str) -> tuple[tuple[str, MergeRecord], ...]:
        """A key that is equal when, and only when, the component's weights are.

        Raises:
            RuntimeError: a parameter is in an unknown state; reconcile first.
        """
        found = []
        for (owner, name), record in self._records.items():
            if owner == component and record is UNKNOWN:
                raise RuntimeError(f"{component}.{name} is half-written: reconcile before using it")
            if owner == component and record:
                found.append((name, record))
        return tuple(sorted(found))

    def differs(self, desired: Sequence[tuple[AdapterLike, float]]) -> bool:
        """Whether `reconcile` would write anything."""
        wanted = self._plan(*_combined(desired))
        return any(self.record(*key) != wanted.get(key, ()) for key in self._parameters)

    @torch.no_grad()
    def reconcile(
        self,
        desired: Sequence[tuple[AdapterLike, float]],
        check_cancelled: CheckCancelled = never_cancelled,
    ) -> Swap:
        """Make the working weights contain `desired` and nothing else.

        Scales of one adapter are summed, and zeros dropped; adapters are added in the order
        of their digests, so the order given does not matter, to the bit.

        Args:
            desired: (adapter, scale) pairs.
            check_cancelled: called before each write; raises to stop. Whatever stops a
                reconciliation, the next one starts from what the records say.

        Raises:
            ValueError: a scale is not finite.
        """
        adapters, combined = _combined(desired)
        wanted = self._plan(adapters, combined)
        stale = [
            (key, record)
            for key in self._parameters
            if self._records.get(key, ()) != (record := wanted.get(key, ()))
        ]
        near = None
        if self._one_pass and any(record for _, record in stale):
            near = self._one_pass.near(combined, adapters)
        written: dict[ParameterName, MergeRecord] = {}
        sources = self._staging.prefetch(self._base(*key) for key, _ in stale)
        try:
            for (key, record), base in zip(stale, sources, strict=True):
                check_cancelled()
                self._write(key, record, base, adapters, near)
                written[key] = record
        finally:
            self._staging.wait()  # also with nothing stale: before whatever is computed next
            self._records |= written
        merged = sum(bool(record) for _, record in stale)
        absent = tuple(sorted(wanted.keys() - self._parameters.keys()))
        return Swap(merged, len(stale) - merged, absent)

    def _plan(
        self, adapters: Mapping[str, AdapterLike], combined: MergeRecord
    ) -> Mapping[ParameterName, MergeRecord]:
        """The record that each touched parameter should have; made once, and kept for a while."""
        plan = self._plans.get(combined)
        return self._plans.put(combined, _wanted(adapters, combined)) if plan is None else plan

    def _write(
        self,
        key: ParameterName,
        record: MergeRecord,
        base: Tensor,
        adapters: Mapping[str, AdapterLike],
        near: DeviceAdapters | None,
    ) -> None:
        """Write one parameter from its base value; its record is unknown afterwards."""
        working = self._parameters[key]
        before, self._records[key] = self._records.get(key, ()), UNKNOWN
        factors = near.factors.get(key) if near and record else None
        if self._one_pass:
            if factors and self._one_pass.write(working, base, factors):
                return
            if before and not record and self._one_pass.restore(working, base):
                return
        exact = base
        if record:
            here = base.to(working.device)  # before it is widened: half to carry
            exact = self._scratch_like(working).copy_(here)
        if factors:
            up, down, scales = factors
            exact[: up.shape[0]].addmm_(up.float() * scales, down.float())
        else:
            for digest, scale in record:
                (near.adapters if near else adapters)[digest].add_to(exact, *key, self._base, scale)
        self._store(working, exact)

    def _scratch_like(self, working: Tensor) -> Tensor:
        """Reused fp32 memory of the parameter's shape: allocating costs more than adding."""
        if self._scratch.device != working.device or self._scratch.numel() < working.numel():
            self._scratch = torch.empty(working.numel(), device=working.device)
        return self._scratch[: working.numel()].view(working.shape)


def _combined(
    desired: Sequence[tuple[AdapterLike, float]],
) -> tuple[dict[str, AdapterLike], MergeRecord]:
    """The adapters by digest; and these with the sums of their scales, but for zeros, sorted."""
    adapters = {adapter.digest: adapter for adapter, _ in desired}
    combined = []
    for digest in sorted(adapters):
        scales = [scale for adapter, scale in desired if adapter.digest == digest]
        scale = math.fsum(scales)  # exact, so that the order given does not matter
        if not math.isfinite(scale):
            raise ValueError(f"the scale of an adapter must be finite, got {scales}")
        if scale:
            combined.append((digest, scale))
    return adapters, tuple(combined)


def _wanted(
    adapters: Mapping[str, AdapterLike], combined: MergeRecord
) -> dict[ParameterName, MergeRecord]:
    """The record that each touched parameter should have."""
    wanted: dict[ParameterName, MergeRecord] = {}
    for digest, scale in combined:
        for key in adapters[digest].parameters:
            wanted[key] = (*wanted.get(key, ()), (digest, scale))
    return wanted
