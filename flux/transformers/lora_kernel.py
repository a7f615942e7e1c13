"""LoRA deltas into a weight in one pass, as Triton kernels.

    working = round(base + sum over k of scales[k] * up[:, k] x down[k, :])

With torch's operators this is four or five passes over a weight (widen, `addmm_` for each adapter,
amplitude, divide, round), about 47 bytes of traffic for each float8 weight. Here a program reads
its tile of the base weight, adds the product of the factors in fp32, and rounds once: 4 bytes a
weight in bf16. For float8 a program owns whole rows and sweeps them twice, once for the amplitude
and once for the values: 5 bytes a weight, of which 2 are read again soon after, while they may
still be in the L2 cache. The rule is that of flux/transformers/float8.py, and its numbers come
from there.

Products are taken in `tf32x3`: each factor is split in two TF32 numbers, and three products of them
are summed in fp32. It leaves out the product of the two remainders, 2^-22 of each product. In a
model of that arithmetic on a CPU, with sums that are cut off every eight products, the error of a
delta against float64 is at most 2^-20.7 of the sum of |up| x |down|, for ranks of 16 to 512. That
of the fp32 `addmm_` is 2^-22.2. Half a step of bf16 is 2^-9, and of e4m3 2^-4.

No atomics, and an order of sums that depends on the shape alone: the same factors give the same
bits. The base value is added after the product, and not accumulated with it, because tensor
cores cut off where they accumulate.

This module imports Triton; flux/transformers/one_pass.py imports it where a card will use it.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torchao.quantization.quantize_.workflows import Float8Tensor

from flux.transformers.float8 import FLOAT8, LARGEST, TINY


class Tile(NamedTuple):
    """What a program rounds at a time, and the warps that do it."""

    rows: int
    columns: int
    warps: int


TILE = Tile(64, 128, 4)
FLOAT8_TILE = Tile(16, 128, 4)  # few rows, so that all multiprocessors have some
DEPTHS = (16, 32)  # of a product; Triton's least is 16
ROUNDS_ONCE_CAPABILITY = (9, 0)  # before, Triton's values pass through fp16: rounded twice
UNALIGNED = ("scales",)  # parts of one vector, wherever they begin: no reason to compile anew
PLAIN = (torch.bfloat16, torch.float16, torch.float32)


def write(
    working: Tensor,
    base: Tensor,
    up: Tensor,
    down: Tensor,
    scales: Tensor,
    *,
    float8: bool = True,
    tile: Tile | None = None,
) -> bool:
    """Write a weight with LoRA deltas in place; return whether it is of a kind that can be.

    Args:
        working: [rows, columns], bf16, fp16, fp32, or float8 with a scale for each row.
        base: [rows, columns], bf16, fp16 or fp32.
        up: [n, rank], bf16, fp16 or fp32, for the first n rows; the others get no delta.
        down: [rank, columns], as `up`. A rank of 0 writes the base value.
        scales: [rank], fp32; of each column of `up`.
        float8: whether the card rounds fp32 to float8 once; see ROUNDS_ONCE_CAPABILITY.
        tile: by default TILE or FLOAT8_TILE.
    """
    target: Tensor = working.qdata if isinstance(working, Float8Tensor) else working
    if not (base.dim() == 2 and base.is_contiguous() and target.is_contiguous()):
        return False
    if base.dtype not in PLAIN or target.dtype not in (*PLAIN, *[FLOAT8] * float8):
        return False
    rows, columns = base.shape
    rank = down.shape[0]
    sizes = (rows, columns, rank, up.shape[0])
    depth = DEPTHS[rank > DEPTHS[0]]
    if isinstance(working, Float8Tensor):
        tile = tile or FLOAT8_TILE
        _quantized[(-(-rows // tile.rows),)](
            *(base, up, down, scales, target, working.scale, *sizes),
            *(LARGEST, TINY, tile.rows, tile.columns, depth),
            num_warps=tile.warps,
        )
    else:
        tile = tile or TILE
        _rounded[(-(-rows // tile.rows), -(-columns // tile.columns))](
            *(base, up, down, scales, target, *sizes),
            *(tile.rows, tile.columns, depth),
            num_warps=tile.warps,
        )
    return True


@triton.jit  # type: ignore[untyped-decorator]
def _exact(
    base, up, down, scales,
    row, column, rows, columns, rank, changed,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of the exact sum in fp32; zero outside of the weight.

    row: [ROWS], int64. column: [COLUMNS]. changed: how many rows `up` has.
    """
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    value = tl.load(base + row[:, None] * columns + column[None, :], mask=inside, other=0.0)
    delta = tl.zeros(inside.shape, tl.float32)
    for start in range(0, rank, DEPTH):
        k = start + tl.arange(0, DEPTH)
        left = tl.load(
            up + row[:, None] * rank + k[None, :],
            mask=(row[:, None] < changed) & (k[None, :] < rank),
            other=0.0,
        )
        right = tl.load(
            down + k[:, None].to(tl.int64) * columns + column[None, :],
            mask=(k[:, None] < rank) & (column[None, :] < columns),
            other=0.0,
        )
        scale = tl.load(scales + k, mask=k < rank, other=0.0)
        left = left.to(tl.float32) * scale[None, :]
        delta = tl.dot(left, right.to(tl.float32), delta, input_precision="tf32x3")
    value = value.to(tl.float32)
    return tl.where(rank > 0, value + delta, value)  # a delta of zeros would change -0.0


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)  # type: ignore[untyped-decorator]
def _rounded(
    base, up, down, scales, working,
    rows, columns, rank, changed,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of a weight of bf16, fp16 or fp32."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exact = _exact(base, up, down, scales, row, column, rows, columns, rank, changed, DEPTH)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    place = working + row[:, None] * columns + column[None, :]
    tl.store(place, exact.to(working.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)  # type: ignore[untyped-decorator]
def _quantized(
    base, up, down, scales, values, amplitudes,
    rows, columns, rank, changed,
    LARGEST: tl.constexpr, TINY: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Rows of a float8 weight, as `quantize_into`: the scales of all, then the values."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    highest = tl.zeros([ROWS], tl.int32)  # bits of |exact|, in the order of values, and NaN above
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        exact = _exact(base, up, down, scales, row, column, rows, columns, rank, changed, DEPTH)
        magnitude = exact.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        highest = tl.maximum(highest, tl.max(magnitude, axis=1))
    scale = tl.div_rn(highest.to(tl.float32, bitcast=True), LARGEST)
    scale = tl.where(scale < TINY, TINY, scale)  # NaN stays
    tl.store(amplitudes + row, scale, mask=row < rows)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        exact = _exact(base, up, down, scales, row, column, rows, columns, rank, changed, DEPTH)
        value = tl.div_rn(exact, tl.broadcast_to(scale[:, None], exact.shape))
        value = tl.clamp(value, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
        inside = (row[:, None] < rows) & (column[None, :] < columns)
        place = values + row[:, None] * columns + column[None, :]
        tl.store(place, value.to(values.dtype.element_ty), mask=inside)
