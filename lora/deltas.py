"""The kinds of difference an adapter file can hold, added to weights in fp32.

Each kind keeps the file's tensors in the file's dtype and knows one thing: how to add
`factor x` some of its rows to an fp32 tensor in place. A dense delta of a whole adapter
would take as much memory as the model four times over, so none is ever stored.

Formulas: LoRA (Hu et al. 2021), LoHa and LoKr (LyCORIS, arXiv 2309.14859), DoRA (Liu et al.
2024, eq. 5).
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Pristine = Callable[[str, str], Tensor]
"""(component, parameter name) -> the parameter's pristine value."""


class Delta(Protocol):
    """A difference to a weight of `rows x columns`, or to a vector of `rows`."""

    def add_to(self, out: Tensor, rows: slice, factor: float) -> None:
        """Add `factor * delta[rows]` to `out` (fp32, that many rows) in place."""
        ...


@dataclass(frozen=True, slots=True)
class Full:
    """The difference itself: `delta = strength * values`, of any shape."""

    values: Tensor
    strength: float = 1.0

    def add_to(self, out: Tensor, rows: slice, factor: float) -> None:
        """See `Delta.add_to`."""
        out.add_(_exact(self.values[rows], out), alpha=factor * self.strength)


@dataclass(frozen=True, slots=True)
class LoRA:
    """`delta = strength * up @ down`; up is `[rows, rank]`, down `[rank, columns]`."""

    up: Tensor
    down: Tensor
    strength: float

    def add_to(self, out: Tensor, rows: slice, factor: float) -> None:
        """See `Delta.add_to`."""
        up, down = _exact(self.up[rows], out), _exact(self.down, out)
        out.addmm_(up, down, alpha=factor * self.strength)


@dataclass(frozen=True, slots=True)
class LoHa:
    """`delta = strength * (w1_a @ w1_b) * (w2_a @ w2_b)`, the middle product elementwise."""

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    strength: float

    def add_to(self, out: Tensor, rows: slice, factor: float) -> None:
        """See `Delta.add_to`."""
        first = _exact(self.w1_a[rows], out) @ _exact(self.w1_b, out)
        second = _exact(self.w2_a[rows], out) @ _exact(self.w2_b, out)
        out.addcmul_(first, second, value=factor * self.strength)


@dataclass(frozen=True, slots=True)
class Factored:
    """One matrix of a LoKr: whole, a product of two, or a Tucker core with two factors.

    With a core, `matrix = sum_ij core[i, j] * a[i, :, None] * b[j, None, :]`.
    """

    whole: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    core: Tensor | None = None

    def matrix(self, like: Tensor) -> Tensor:
        """The matrix in fp32, on the device of `like`."""
        if self.whole is not None:
            return _exact(self.whole, like)
        assert self.a is not None
        assert self.b is not None
        a, b = _exact(self.a, like), _exact(self.b, like)
        if self.core is None:
            return a @ b
        return a.T @ _exact(self.core, like) @ b


@dataclass(frozen=True, slots=True)
class LoKr:
    """`delta = strength * kron(w1, w2)`."""

    w1: Factored
    w2: Factored
    strength: float

    def add_to(self, out: Tensor, rows: slice, factor: float) -> None:
        """See `Delta.add_to`; row block i of the product is `w1[i] (x) w2`, added by itself."""
        w1, w2 = self.w1.matrix(out), self.w2.matrix(out)
        height = w2.shape[0]
        for index in range(rows.start // height, -(-rows.stop // height)):
            start = index * height
            first, last = max(rows.start, start), min(rows.stop, start + height)
            block = out[first - rows.start : last - rows.start]
            block.view(last - first, w1.shape[1], w2.shape[1]).addcmul_(
                w1[index].view(1, -1, 1),
                w2[first - start : last - start].unsqueeze(1),
                value=factor * self.strength,
            )


@dataclass(frozen=True, slots=True)
class Part:
    """The rows `source` of a delta, which are the rows `target` of one parameter."""

    parameter: str
    source: slice
    target: slice


@dataclass(frozen=True, slots=True)
class DoRA:
    """`delta = m (W + d) / norm(W + d) - W` from the pristine W and a `delta` d of any kind.

    `magnitude` is `[rows, 1]` (one norm for each output row) or `[1, columns]` (one for each
    input column). A column's norm runs over all rows of the module as it was trained, so
    `parts` tells which parameters of the model make up a fused one.
    """

    delta: Delta
    magnitude: Tensor
    component: str
    parts: tuple[Part, ...]

    def add_part(self, out: Tensor, part: Part, factor: float, pristine: Pristine) -> None:
        """Add `factor * delta[part.source]` to `out` (fp32, that many rows) in place."""
        weight, moved = self._moved(part, out, pristine)
        magnitude = _exact(self.magnitude, out)
        if magnitude.shape[1] == 1:
            magnitude = magnitude[part.source]
            norm = moved.norm(dim=1, keepdim=True)
        else:
            squares = [
                self._moved(other, out, pristine)[1].square_().sum(dim=0, keepdim=True)
                for other in self.parts
            ]
            norm = torch.stack(squares).sum(dim=0).sqrt_()
        moved.mul_(magnitude / norm.clamp_min_(torch.finfo(torch.float32).tiny))
        out.add_(moved.sub_(weight), alpha=factor)

    def _moved(self, part: Part, like: Tensor, pristine: Pristine) -> tuple[Tensor, Tensor]:
        """W and W + d in fp32, for the rows of one part."""
        weight = _exact(pristine(self.component, part.parameter)[part.target], like)
        moved = weight.clone()
        self.delta.add_to(moved, part.source, 1.0)
        return weight, moved


@dataclass(frozen=True, slots=True)
class Contribution:
    """What an adapter adds to some rows of one parameter."""

    delta: Delta | DoRA
    part: Part

    def add_to(self, scratch: Tensor, factor: float, pristine: Pristine) -> None:
        """Add `factor * delta` to the parameter's `scratch` (fp32) in place."""
        out = scratch[self.part.target]
        if isinstance(self.delta, DoRA):
            self.delta.add_part(out, self.part, factor, pristine)
        else:
            self.delta.add_to(out, self.part.source, factor)


def placed(value: T, send: Callable[[Tensor], Tensor]) -> T:
    """A delta, or what is made of them, with the tensors that `send` gives for its own."""
    changed: Any = value
    if isinstance(value, Tensor):
        changed = send(value)
    elif is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: placed(getattr(value, field.name), send) for field in fields(value)}
        changed = replace(value, **parts)
    return changed  # type: ignore[no-any-return]


def _exact(values: Tensor, like: Tensor) -> Tensor:
    """`values` in fp32 on the device of `like`; products in bf16 would lose what fp32 keeps.

    The bus carries the file's dtype, and from page-locked memory without the host waiting.
    """
    return values.to(like.device, non_blocking=True).float()
