"""Weights of any shape with LoRA adapters of any factors, and what they should come to."""

import torch
from torch import Tensor, nn

from flux.transformers.float8 import empty_float8, storage, store
from flux.transformers.merge import WorkingWeights
from flux.transformers.one_pass import OnePass
from lora.formats.adapter import Adapter
from lora.formats.deltas import Contribution, LoRA
from lora.formats.keys import Piece, Target

COMPONENT = "transformer"


class Kernel:
    """What stands in for the kernel; it fails at the n-th weight."""

    def __init__(self, error: Exception | None = None, at: int = 1) -> None:
        self.error, self.at = error, at
        self.written = 0

    def __call__(self, weight, before, up, down, scales) -> bool:
        if self.error and self.written + 1 == self.at:
            raise self.error
        self.written += 1
        exact = before.float().clone()
        exact[: up.shape[0]] += (up.float() * scales) @ down.float()
        store(weight, exact)
        return True


def factors(
    rows: int, columns: int, rank: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> LoRA:
    """A delta about as large as a weight of `base`."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    up = torch.randn(rows, rank, generator=generator) / rank**0.5
    down = torch.randn(rank, columns, generator=generator)
    return LoRA(up.to(dtype), down.to(dtype), 0.5)


def base(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator)
    return (weight * torch.logspace(-4, 2, rows)[:, None]).to(dtype)


def adapter(digest: str, **deltas: tuple[LoRA, slice, slice]) -> Adapter:
    """An adapter of deltas by parameter, each with rows of it and the rows they are added to."""
    found = {}
    for name, (delta, source, target) in deltas.items():
        piece = Piece(name, source, target)
        shape = (delta.up.shape[0], delta.down.shape[1])
        module = Target(COMPONENT, name, "", shape, (piece,), has_bias=False)
        found[COMPONENT, name] = (Contribution(delta, piece, module),)
    size = sum(delta.up.nbytes + delta.down.nbytes for delta, *_ in deltas.values())
    return Adapter(digest, "", len(found), size, (), (), found)


def whole(digest: str, **deltas: LoRA) -> Adapter:
    """One of deltas to whole parameters."""
    every = {name: slice(0, delta.up.shape[0]) for name, delta in deltas.items()}
    return adapter(digest, **{name: (d, every[name], every[name]) for name, d in deltas.items()})


def working(
    values: dict[str, Tensor],
    one_pass: OnePass | None = None,
    *,
    float8: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[WorkingWeights, dict[str, Tensor]]:
    """Blank weights to be written from base values, and the parameters themselves."""
    parameters: dict[str, Tensor] = {}
    for name, value in values.items():
        empty = torch.empty_like(value, dtype=dtype)
        if float8 and value.dim() == 2:
            empty = empty_float8(value.shape, dtype, value.device, dynamic=False)
        parameters[name] = nn.Parameter(empty, requires_grad=False)
    modules = {COMPONENT: nn.ParameterDict(parameters)}
    read = lambda _, name: values[name]  # noqa: E731
    return WorkingWeights(modules, read, store, one_pass=one_pass, blank=True), parameters


def bits(parameters: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    return {
        name: [tensor.detach().clone().view(torch.uint8) for tensor in storage(value)]
        for name, value in parameters.items()
    }


def same(one: dict[str, list[Tensor]], other: dict[str, list[Tensor]]) -> bool:
    pairs = [zip(one[name], other[name], strict=True) for name in one]
    return all(torch.equal(a, b) for pair in pairs for a, b in pair)


def assert_rounded(found: Tensor, before: Tensor, deltas: list[tuple[LoRA, float]]) -> None:
    """A weight, whole deltas of which have been added, is the nearest to the exact sum.

    It is within half a step of its format, and what fp32 sums and products may lose.
    """
    exact, lost = before.double(), before.double().abs() * 2**-22
    for delta, scale in deltas:
        up, down, factor = delta.up.double(), delta.down.double(), scale * delta.scaling
        exact = exact + factor * up @ down
        lost = lost + abs(factor) * (up.abs() @ down.abs()) * 2**-20
    if hasattr(found, "qdata"):
        amplitude = exact.abs().amax(dim=1, keepdim=True)
        loss = lost.amax(dim=1, keepdim=True)
        assert ((found.scale.double() - amplitude / 448).abs() <= loss / 448 + 1e-37).all()
        scale = found.scale.double()
        half_step = torch.maximum(exact.abs() * 2**-4, scale * 2**-10)
        found = found.qdata.double() * scale
        lost = 2 * lost + 2 * loss * 2**-3
    else:
        half_step = exact.abs() * torch.finfo(found.dtype).eps / 2
    assert ((found.double() - exact).abs() <= half_step * (1 + 1e-6) + lost).all()
