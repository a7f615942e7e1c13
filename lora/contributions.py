"""The tensors of checked modules, read and made into what they add to the model's parameters.

Nothing that can overflow fp32 gets past this file, whoever adds it up later: all values are
finite, and so is the most that a module's tensors can come to when they are multiplied.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lora.deltas import Contribution, Delta, DoRA, Factored, Full, LoHa, LoKr, LoRA, Part
from lora.header import AdapterError, short
from lora.kinds import Group, Layout
from lora.metadata import AdapterSettings

LARGEST = 1e15
"""The most that a difference may come to. Weights are far smaller, and the squares of as many such
values as a row has, which DoRA adds up, are within fp32."""

Parameter = tuple[str, str]
"""(component, parameter name)."""


def read_contributions(
    groups: Sequence[Group], settings: AdapterSettings, read: Callable[[str], Tensor]
) -> dict[Parameter, tuple[Contribution, ...]]:
    """Read and check the tensors of each group, and file their deltas by parameter.

    Args:
        groups: checked, and none of them empty.
        settings: alphas of the file's header.
        read: key -> tensor.

    Raises:
        AdapterError: values that are not finite or not usable.
    """
    result: dict[Parameter, tuple[Contribution, ...]] = {}
    for group in groups:
        tensors, peaks = {}, {}
        for role, key in group.keys.items():
            if role != "alpha":
                tensor, peaks[role] = _checked(key, read(key))
                tensors[role] = tensor.reshape(group.shapes[role])
        strength = _strength(group, settings, read)
        _refuse_overflow(group, peaks, strength)
        for name, delta in _deltas(group, tensors, strength):
            for part in _parts(group, name):
                parameter = (group.place.component, part.parameter)
                found = result.get(parameter, ())
                result[parameter] = (*found, Contribution(delta, part))
    return result


def _checked(key: str, tensor: Tensor) -> tuple[Tensor, float]:
    """`tensor` in memory of its own, if all its values are finite, and the largest of them.

    safetensors maps the file; a copy does not depend on what becomes of the file. The
    extremes tell in one pass whether values are finite: NaN propagates into both.
    """
    tensor = tensor.clone()
    if not tensor.numel():
        return tensor, 0.0
    extremes = torch.aminmax(tensor.float() if tensor.element_size() == 1 else tensor)
    peak = max(abs(value.item()) for value in extremes)
    if not all(math.isfinite(value.item()) for value in extremes):
        raise AdapterError(f"{short(key)} has values that are not finite; the file is damaged")
    return tensor, peak


def _strength(group: Group, settings: AdapterSettings, read: Callable[[str], Tensor]) -> float:
    """Alpha / rank: alpha from its own key, else from the header, else 1.0 altogether.

    Where nothing is factored (a full difference, a LoKr of two whole matrices) alpha means
    nothing: trainers write placeholders there, up to infinity.
    """
    if not group.rank:
        return 1.0
    if "alpha" not in group.keys:
        return settings.strength(group.place.component, group.place.spelling, group.rank)
    alpha = float(read(group.keys["alpha"]).item())
    if not 0 < alpha < float("inf"):
        raise AdapterError(
            f"{short(group.keys['alpha'])} is {alpha}; it must be a finite number above 0"
        )
    return alpha / group.rank


def _refuse_overflow(group: Group, peaks: Mapping[str, float], strength: float) -> None:
    """Bound what the module's tensors can come to, from the largest value of each.

    A factor below 1 counts as 1, so that the bound holds for products of some of them too.
    """
    scale = max(1.0, strength)
    reach = max(scale * peak for peak in peaks.values())
    if group.layout is not None:
        factors = math.prod(max(1.0, peaks[role]) for role in group.layout.shapes)
        reach = max(reach, scale * factors * float(group.rank or 1) ** group.layout.sums)
    if reach > LARGEST:
        raise AdapterError(
            f"{short(group.spelling)} has values that come to as much as {reach:.0e} when they are "
            f"multiplied; at most {LARGEST:.0e} is accepted, because weights would overflow. The "
            "file is damaged: export or download it again."
        )


def _deltas(
    group: Group, tensors: Mapping[str, Tensor], strength: float
) -> list[tuple[str, Delta | DoRA]]:
    """The differences of one module: to its weight, and to its bias."""
    deltas: list[tuple[str, Delta | DoRA]] = []
    if group.layout is not None:
        delta = _delta(group.layout, tensors, strength)
        if "magnitude" in tensors:
            magnitude = _magnitude_matrix(tensors["magnitude"], group.place.shape[0])
            dora = DoRA(delta, magnitude, group.place.component, _parts(group, "weight"))
            deltas.append(("weight", dora))
        else:
            deltas.append(("weight", delta))
    if "up_bias" in tensors:
        deltas.append(("bias", Full(tensors["up_bias"], strength)))
    if "diff_b" in tensors:
        deltas.append(("bias", Full(tensors["diff_b"])))
    return deltas


def _delta(layout: Layout, tensors: Mapping[str, Tensor], strength: float) -> Delta:
    """The delta of a module's weight from its tensors (role -> tensor)."""
    if layout.kind == "LoRA":
        return LoRA(tensors["up"], tensors["down"], strength)
    if layout.kind == "LoHa":
        w1_a, w1_b, w2_a, w2_b = (tensors[f"hada_{n}"] for n in ("w1_a", "w1_b", "w2_a", "w2_b"))
        return LoHa(w1_a, w1_b, w2_a, w2_b, strength)
    if layout.kind == "LoKr":
        first = (tensors.get(f"lokr_{name}") for name in ("w1", "w1_a", "w1_b"))
        second = (tensors.get(f"lokr_{name}") for name in ("w2", "w2_a", "w2_b", "t2"))
        return LoKr(Factored(*first), Factored(*second), strength)
    return Full(tensors["diff"], strength)


def _magnitude_matrix(magnitude: Tensor, rows: int) -> Tensor:
    """A DoRA magnitude as `[rows, 1]` or `[1, columns]`; a bare vector of `rows` is per row."""
    if magnitude.dim() == 2:
        return magnitude
    return magnitude.unsqueeze(1) if magnitude.shape[0] == rows else magnitude.unsqueeze(0)


def _parts(group: Group, name: str) -> tuple[Part, ...]:
    return tuple(
        Part(f"{piece.module}.{name}", piece.source, piece.target) for piece in group.place.pieces
    )
