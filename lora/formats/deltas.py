"""The kinds of difference an adapter file can hold, added to weights in fp32.

Each kind keeps the file's tensors in the file's dtype and knows one thing: how to add `scale x`
some of its rows to an fp32 tensor in place. Some are made from the base weight, here and in
`lora/formats/rotations.py`; they read the rows that they need. A dense delta of a whole adapter
would take as much memory as the model four times over, so none is ever stored.

Formulas: LoRA (Hu et al. 2021), LoHa and LoKr (LyCORIS, arXiv 2309.14859), DoRA (Liu et al.
2024, eq. 5), GLoRA (Chavan et al. 2023, arXiv 2306.07967, as in LyCORIS' modules/glora.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from lora.formats.keys import Piece, Target

T = TypeVar("T")
LEAST_NORM = torch.finfo(torch.float32).tiny ** 0.5
"""Of a row or column; the squares of smaller values are lost in fp32, and a quotient overflows."""
BaseValues = Callable[[str, str], Tensor]
"""(component, parameter name) -> the parameter's base value."""


@dataclass(frozen=True, slots=True)
class Weight:
    """The base weight of a module, read where a delta needs it.

    Attributes:
        target: the module as its trainer saw it, and so the order of its rows.
        base: (component, parameter name) -> the parameter's base value.
        like: a tensor on the device where it is wanted.
    """

    target: Target
    base: BaseValues
    like: Tensor

    def rows(self, rows: slice) -> Tensor:
        """Some rows in fp32, which the caller must not write to."""
        found = []
        for piece in sorted(self.target.pieces, key=lambda piece: piece.source.start):
            first = max(rows.start, piece.source.start)
            last = min(rows.stop, piece.source.stop)
            if first < last:
                shift = piece.target.start - piece.source.start
                values = self.base(self.target.component, f"{piece.module}.weight")
                found.append(exact(values[first + shift : last + shift], self.like))
        return found[0] if len(found) == 1 else torch.cat(found)


class Delta(Protocol):
    """A difference to a weight of `rows x columns`, or to a vector of `rows`."""

    def add_to(self, out: Tensor, rows: slice, scale: float, weight: Weight, /) -> None:
        """Add `scale * delta[rows]` to `out` (fp32, that many rows) in place.

        Args:
            out: what is added to.
            rows: of the module as it was trained.
            scale: any finite number; the delta itself does not depend on it.
            weight: the base weight of the module, for deltas that are made from it.
        """
        ...


@dataclass(frozen=True, slots=True)
class Full:
    """The difference itself: `delta = scaling * values`, of any shape."""

    values: Tensor
    scaling: float = 1.0

    def add_to(self, out: Tensor, rows: slice, scale: float, _weight: Weight, /) -> None:
        """See `Delta.add_to`."""
        out.add_(exact(self.values[rows], out), alpha=scale * self.scaling)


@dataclass(frozen=True, slots=True)
class LoRA:
    """`delta = scaling * up @ down`; up is `[rows, rank]`, down `[rank, columns]`."""

    up: Tensor
    down: Tensor
    scaling: float

    def add_to(self, out: Tensor, rows: slice, scale: float, _weight: Weight, /) -> None:
        """See `Delta.add_to`."""
        up, down = exact(self.up[rows], out), exact(self.down, out)
        out.addmm_(up, down, alpha=scale * self.scaling)


@dataclass(frozen=True, slots=True)
class LoHa:
    """`delta = scaling * (w1_a @ w1_b) * (w2_a @ w2_b)`, the middle product elementwise."""

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    scaling: float

    def add_to(self, out: Tensor, rows: slice, scale: float, _weight: Weight, /) -> None:
        """See `Delta.add_to`."""
        first = exact(self.w1_a[rows], out) @ exact(self.w1_b, out)
        second = exact(self.w2_a[rows], out) @ exact(self.w2_b, out)
        out.addcmul_(first, second, value=scale * self.scaling)


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
            return exact(self.whole, like)
        assert self.a is not None
        assert self.b is not None
        a, b = exact(self.a, like), exact(self.b, like)
        if self.core is None:
            return a @ b
        return a.T @ exact(self.core, like) @ b


@dataclass(frozen=True, slots=True)
class LoKr:
    """`delta = scaling * kron(w1, w2)`."""

    w1: Factored
    w2: Factored
    scaling: float

    def add_to(self, out: Tensor, rows: slice, scale: float, _weight: Weight, /) -> None:
        """See `Delta.add_to`; with h rows in w2, row r of it is `w1[r // h] (x) w2[r % h]`.

        It is one operator: on a card, one for each row of w1 would take longer to send than to do.
        """
        w1, w2 = self.w1.matrix(out), self.w2.matrix(out)
        row = torch.arange(rows.start, rows.stop, device=out.device)
        out.view(len(row), w1.shape[1], w2.shape[1]).addcmul_(
            w1[row // w2.shape[0]].unsqueeze(2),
            w2[row % w2.shape[0]].unsqueeze(1),
            value=scale * self.scaling,
        )


@dataclass(frozen=True, slots=True)
class GLoRA:
    """`delta = scaling * (W @ a_up @ a_down + b_up @ b_down)` from the base weight W.

    a_up is `[columns, rank]`, b_up `[rows, rank]`, a_down and b_down are `[rank, columns]`.
    """

    a_up: Tensor
    a_down: Tensor
    b_up: Tensor
    b_down: Tensor
    scaling: float

    def add_to(self, out: Tensor, rows: slice, scale: float, weight: Weight, /) -> None:
        """See `Delta.add_to`."""
        alpha = scale * self.scaling
        turned = weight.rows(rows) @ exact(self.a_up, out)
        out.addmm_(turned, exact(self.a_down, out), alpha=alpha)
        out.addmm_(exact(self.b_up[rows], out), exact(self.b_down, out), alpha=alpha)


@dataclass(frozen=True, slots=True)
class DoRA:
    """`delta = m (W + d) / norm(W + d) - W` from the base weight W and a `delta` d of any kind.

    `magnitude` is `[rows, 1]` (one norm for each output row) or `[1, columns]` (one for each
    input column). A column's norm runs over all rows of the module as it was trained.
    """

    delta: Delta
    magnitude: Tensor

    def add_to(self, out: Tensor, rows: slice, scale: float, weight: Weight, /) -> None:
        """See `Delta.add_to`."""
        before, moved = self._moved(rows, weight)
        magnitude = exact(self.magnitude, out)
        if magnitude.shape[1] == 1:
            magnitude = magnitude[rows]
            norm = moved.norm(dim=1, keepdim=True)
        else:
            squares = [
                self._moved(piece.source, weight)[1].square_().sum(dim=0, keepdim=True)
                for piece in weight.target.pieces
            ]
            norm = torch.stack(squares).sum(dim=0).sqrt_()
        moved.mul_(magnitude / norm.clamp_min_(LEAST_NORM))
        out.add_(moved.sub_(before), alpha=scale)

    def _moved(self, rows: slice, weight: Weight) -> tuple[Tensor, Tensor]:
        """Some rows of W and of W + d, in fp32."""
        before = weight.rows(rows)
        moved = before.clone()
        self.delta.add_to(moved, rows, 1.0, weight)
        return before, moved


@dataclass(frozen=True, slots=True)
class Contribution:
    """What an adapter adds to some rows of one parameter: `piece` of the delta of `target`."""

    delta: Delta
    piece: Piece
    target: Target

    def add_to(self, total: Tensor, scale: float, base: BaseValues) -> None:
        """Add `scale * delta` to the parameter's `total` (fp32) in place."""
        out = total[self.piece.target]
        self.delta.add_to(out, self.piece.source, scale, Weight(self.target, base, out))


def placed(value: T, send: Callable[[Tensor], Tensor]) -> T:
    """A delta, or what is made of them, with the tensors that `send` gives for its own."""
    changed: Any = value
    if isinstance(value, Tensor):
        changed = send(value)
    elif is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: placed(getattr(value, field.name), send) for field in fields(value)}
        changed = replace(value, **parts)
    return changed  # type: ignore[no-any-return]


def exact(values: Tensor, like: Tensor) -> Tensor:
    """`values` in fp32 on the device of `like`; products in bf16 would lose what fp32 keeps.

    The bus carries the file's dtype, and from page-locked memory without the host waiting.
    """
    return values.to(like.device, non_blocking=True).float()
