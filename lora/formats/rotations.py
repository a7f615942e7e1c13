"""Orthogonal fine-tuning: differences that turn the base weight.

All of them begin with a skew-symmetric matrix Q for each block of rows or columns, and with the
rotation R that the Cayley transform makes of it. What is computed is R - I, so that a small
rotation of a large weight keeps its digits, and `delta = (R - I) W` in one form or the other.

Formulas: OFT (Qiu et al. 2023, arXiv 2306.07280) and BOFT (Liu et al. 2023, arXiv 2311.06243), in
the forms that trainers wrote: LyCORIS' modules/diag_oft.py and modules/boft.py turn outputs,
PEFT's tuners/oft/layer.py and OneTrainer's modules/module/oft_utils.py turn inputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lora.formats.deltas import Weight, exact

COLUMNS = 512  # of a weight that a butterfly turns at a time


@dataclass(frozen=True, slots=True)
class OutputOFT:
    """`delta = rescale * (R^T W) - W`, with R block-diagonal over the rows (LyCORIS).

    Attributes:
        blocks: `[blocks, size, size]`; Q is each of them less its transpose.
        constraint: the most that the norm of all Q together may be; inf for none.
        rescale: `[rows, 1]`, or None for ones.
    """

    blocks: Tensor
    constraint: float
    rescale: Tensor | None

    def add_to(self, out: Tensor, rows: slice, scale: float, weight: Weight, /) -> None:
        """See `Delta.add_to`; reads the weight of all blocks that the rows lie in."""
        size = self.blocks.shape[-1]
        first, last = rows.start // size, -(-rows.stop // size)
        before = weight.rows(slice(first * size, last * size))
        turn = _cayley(self.blocks, self.constraint, out, slice(first, last)).transpose(1, 2)
        change = (turn @ before.reshape(last - first, size, -1)).flatten(0, 1)
        inside = slice(rows.start - first * size, rows.stop - first * size)
        _add_rescaled(out, change[inside], before[inside], self.rescale, rows, scale)


@dataclass(frozen=True, slots=True)
class OutputBOFT:
    """`delta = rescale * (B_m ... B_2 B_1 W) - W`, with butterfly factors B_i (LyCORIS).

    Factor i takes rows in groups of 2 x k, for k = size / 2 * 2^i, interleaves the two halves
    of each group, turns each block of `size` rows by its R, and undoes the interleaving.

    Attributes:
        blocks: `[factors, blocks, size, size]`; Q is each of them less its transpose.
        constraint: the most that the norm of all Q together may be; inf for none.
        rescale: `[rows, 1]`, or None for ones.
    """

    blocks: Tensor
    constraint: float
    rescale: Tensor | None

    def add_to(self, out: Tensor, rows: slice, scale: float, weight: Weight, /) -> None:
        """See `Delta.add_to`; reads the whole weight, since all of its rows are mixed.

        Columns are not, and so only some of them at a time take memory for what lies between.
        """
        _, blocks, size, _ = self.blocks.shape
        turns = _cayley(self.blocks, self.constraint, out)
        whole = weight.rows(slice(0, blocks * size))
        parts = (torch.split(tensor, COLUMNS, dim=1) for tensor in (whole, out))
        for before, some in zip(*parts, strict=True):
            change = torch.zeros_like(before)
            for index, turn in enumerate(turns):
                half = size // 2 * 2**index
                mixed = _swapped(before + change, 2, half).reshape(blocks, size, -1)
                change += _swapped((turn @ mixed).flatten(0, 1), half, 2)
            _add_rescaled(some, change[rows], before[rows], self.rescale, rows, scale)


@dataclass(frozen=True, slots=True)
class InputOFT:
    """`delta = W R^T - W`, with R block-diagonal over the columns (PEFT, OneTrainer).

    R is the Cayley transform as both trainers compute it unless told otherwise: its series
    `(I + Q) (I - Q)^-1 = I + 2 Q + 2 Q^2 + ...`, ended with `2 Q^3 + Q^4`.

    Attributes:
        packed: `[blocks, size * (size - 1) / 2]`, the part of each Q above its diagonal, row by
            row; a single one is shared by all blocks of columns.
        size: of a block.
        scaling: what Q is multiplied by.
    """

    packed: Tensor
    size: int
    scaling: float

    def add_to(self, out: Tensor, rows: slice, scale: float, weight: Weight, /) -> None:
        """See `Delta.add_to`."""
        packed = exact(self.packed, out) * self.scaling
        above = packed.new_zeros(packed.shape[0], self.size, self.size)
        row, column = torch.triu_indices(self.size, self.size, 1, device=out.device)
        above[:, row, column] = packed
        skew = above - above.transpose(1, 2)
        square = skew @ skew
        turn = 2 * (skew + square + skew @ square) + square @ square
        height, columns = out.shape
        before = weight.rows(rows).reshape(height, columns // self.size, self.size).transpose(0, 1)
        change = before @ turn.transpose(1, 2)
        out.add_(change.transpose(0, 1).reshape(height, columns), alpha=scale)


def _cayley(blocks: Tensor, constraint: float, like: Tensor, wanted: slice = slice(None)) -> Tensor:
    """`R - I = 2 Q (I - Q)^-1` in fp32, for `R = (I + Q) (I - Q)^-1` of each wanted Q.

    In float64, because the inverse loses as many digits as Q is large. `I - Q` always has an
    inverse, and so the device is not asked whether it had.
    """
    skew = exact(blocks, like).double()
    skew = skew - skew.transpose(-1, -2)
    norm = skew.norm() + 1e-8  # as LyCORIS adds it
    skew = skew[wanted] * (constraint / norm).clamp(max=1.0)
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    turned: Tensor = torch.linalg.solve_ex(eye - skew, 2 * skew, left=False).result
    return turned.float()


def _swapped(rows: Tensor, outer: int, inner: int) -> Tensor:
    """Rows in groups of outer x inner, in the order inner x outer."""
    height, columns = rows.shape
    groups = rows.reshape(height // (outer * inner), outer, inner, columns)
    return groups.transpose(1, 2).reshape(height, columns)


def _add_rescaled(
    out: Tensor, change: Tensor, before: Tensor, rescale: Tensor | None, rows: slice, scale: float
) -> None:
    """Add `scale * (rescale * (before + change) - before)` to `out`."""
    if rescale is not None:
        factors = exact(rescale, out)[rows]
        change = factors * change + (factors - 1) * before
    out.add_(change, alpha=scale)
