"""The tensors of checked modules, read and made into what they add to the model's parameters.

Nothing that can overflow fp32 gets past this file, whoever adds it up later: all values are
finite, and so is the most that a module's tensors can come to when they are multiplied.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lora.formats.deltas import Contribution, Delta, DoRA, Factored, Full, GLoRA, LoHa, LoKr, LoRA
from lora.formats.errors import AdapterError
from lora.formats.kinds import NUMBERS, Group
from lora.formats.metadata import AdapterSettings
from lora.formats.rotations import InputOFT, OutputBOFT, OutputOFT
from weights.header import short

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
            if role not in NUMBERS:
                tensor, peaks[role] = _checked(key, read(key))
                tensors[role] = tensor.reshape(group.shapes[role])
        scaling = _scaling(group, settings, read)
        _refuse_overflow(group, peaks, scaling)
        for name, delta in _deltas(group, tensors, scaling):
            for piece in group.target.pieces:
                parameter = (group.target.component, f"{piece.module}.{name}")
                found = result.get(parameter, ())
                result[parameter] = (*found, Contribution(delta, piece, group.target))
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


def _scaling(group: Group, settings: AdapterSettings, read: Callable[[str], Tensor]) -> float:
    """What alpha makes of a module's delta: mostly alpha / rank.

    Alpha is that of its own key, else of the header; without any, the scaling is 1.0. Where
    nothing is factored (a full difference, a LoKr of two whole matrices) a key's alpha means
    nothing: trainers write placeholders there, up to infinity; PEFT's settings hold for a LoKr all
    the same. Where outputs are turned, it gives the most that the rotation's norm may be, as
    alpha x rows; 0 is no limit (LyCORIS' modules/diag_oft.py). Where inputs are turned, the flag
    `scaled_oft` divides by the square root of the number of values (ComfyUI-OFTv2).
    """
    key = group.keys.get("alpha")
    if "oft_blocks" in group.keys:
        alpha = float(read(key).item()) if key else 0.0
        return alpha * group.target.shape[0] if 0 < alpha < math.inf else math.inf
    if "oft_R" in group.keys:
        return max(1, group.sizes["packed"]) ** -0.5 if "oft_scaled" in group.keys else 1.0
    if not group.rank and (key or group.kind != "LoKr"):
        return 1.0
    if key is None:
        return settings.scaling(group.target.component, group.target.spelling, group.rank)
    assert group.rank
    alpha = float(read(key).item())
    if not 0 < alpha < math.inf:
        raise AdapterError(f"{short(key)} is {alpha}; it must be a finite number above 0")
    return alpha / group.rank


def _refuse_overflow(group: Group, peaks: Mapping[str, float], scaling: float) -> None:
    """Bound what the module's tensors can come to, from the largest value of each.

    A factor below 1 counts as 1, so that the bound holds for products of some of them too.
    """
    layout, sizes = group.layout, group.sizes
    scale = 1.0 if layout is not None and layout.turns else max(1.0, scaling)
    reach = max(scale * peak for peak in peaks.values())
    if layout is not None and layout.turns:
        rotation = peaks.get("oft_blocks", peaks.get("oft_R", 0.0))
        reach = max(reach, math.prod([2 * sizes["size"] * rotation] * layout.turns))
    elif layout is not None:
        factors = math.prod(max(1.0, peaks[role]) for role in layout.shapes)
        reach = max(reach, scale * factors * float(group.rank or 1) ** layout.sums)
    if reach > LARGEST:
        raise AdapterError(
            f"{short(group.spelling)} has values that come to as much as {reach:.0e} when they are "
            f"multiplied; at most {LARGEST:.0e} is accepted, because weights would overflow; "
            "the file is damaged, so export or download it again"
        )


def _deltas(group: Group, tensors: Mapping[str, Tensor], scaling: float) -> list[tuple[str, Delta]]:
    """The differences of one module: to its weight, and to its bias."""
    deltas: list[tuple[str, Delta]] = []
    if group.layout is not None:
        delta = _delta(group, tensors, scaling)
        if "magnitude" in tensors:
            delta = DoRA(delta, _magnitude_matrix(tensors["magnitude"], group.target.shape[0]))
        deltas.append(("weight", delta))
    if "up_bias" in tensors:
        deltas.append(("bias", Full(tensors["up_bias"], scaling)))
    if "diff_b" in tensors:
        deltas.append(("bias", Full(tensors["diff_b"])))
    return deltas


def _delta(group: Group, tensors: Mapping[str, Tensor], scaling: float) -> Delta:
    """The delta of a module's weight from its tensors (role -> tensor)."""
    assert group.layout is not None
    match group.layout.kind:
        case "LoRA":
            return LoRA(tensors["up"], tensors["down"], scaling)
        case "LoHa":
            first, second = (
                (tensors[f"hada_{name}_a"], tensors[f"hada_{name}_b"]) for name in ("w1", "w2")
            )
            return LoHa(*first, *second, scaling)
        case "LoKr":
            left = (tensors.get(f"lokr_{name}") for name in ("w1", "w1_a", "w1_b"))
            right = (tensors.get(f"lokr_{name}") for name in ("w2", "w2_a", "w2_b", "t2"))
            return LoKr(Factored(*left), Factored(*right), scaling)
        case "GLoRA" | "old GLoRA" as kind:
            a1, a2, b1, b2 = (tensors[f"glora_{name}"] for name in ("a1", "a2", "b1", "b2"))
            if kind == "GLoRA":
                return GLoRA(a1, a2, b1, b2, scaling)
            return GLoRA(a2, a1, b2, b1, scaling)
        case "OFT":
            return OutputOFT(tensors["oft_blocks"], scaling, tensors.get("rescale"))
        case "BOFT":
            return OutputBOFT(tensors["oft_blocks"], scaling, tensors.get("rescale"))
        case "OFT of inputs":
            return InputOFT(tensors["oft_R"], group.sizes["size"], scaling)
        case "full difference":
            return Full(tensors["diff"], scaling)
        case kind:
            raise NotImplementedError(f"{kind}: a row in kinds.py without a case here")


def _magnitude_matrix(magnitude: Tensor, rows: int) -> Tensor:
    """A DoRA magnitude as `[rows, 1]` or `[1, columns]`; a bare vector of `rows` is per row."""
    if magnitude.dim() == 2:
        return magnitude
    return magnitude.unsqueeze(1) if magnitude.shape[0] == rows else magnitude.unsqueeze(0)
