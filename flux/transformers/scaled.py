"""Products of float8 matrices with a scale for each row, of any number of rows.

`torch._scaled_mm` asks cuBLASLt for an algorithm, and with scales for each row there is none for
some shapes of FLUX.1 (docs/fp8.md says which). So every shape is tried once, at its first use: as
it is, then with rows of zeros added, up to a number that is accepted. If none is, the product is
computed from widened values, in the output's dtype.

The product is a custom operator, which is opaque to the compiler. A condition on the number of rows
in Python would become a guard, and small images would compile again.
"""

import logging
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization.quantize_.workflows import Float8Tensor

from flux.memory.device import is_out_of_memory

logger = logging.getLogger(__name__)

MORE_ROWS = (272, 528, 1040)  # to try where fewer are refused: 257 are enough for rows of 9216
SHAPES = 4096  # whose outcome is remembered; a size of image has about ten


class Float8Weight(Float8Tensor):  # type: ignore[misc]
    """A weight whose linear quantizes its inputs per row and multiplies in float8."""


def multiply(
    left: Tensor,
    right: Tensor,
    left_scale: Tensor,
    right_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`(left * left_scale) @ (right * right_scale).T + bias`, [m, n].

    Args:
        left: [m, k], e4m3.
        right: [n, k], e4m3.
        left_scale: [m, 1], fp32.
        right_scale: [n, 1], fp32.
        bias: [n], or None.
        dtype: of the result.
    """
    rows, inner = left.shape
    taken = rows_taken(left.device, rows, inner, right.shape[0], dtype, bias is not None)
    if taken is None:
        product = (left.to(dtype) @ right.to(dtype).T).float() * left_scale * right_scale.T
        return (product if bias is None else product + bias).to(dtype)
    if taken == rows:
        return _scaled_mm(left, right, left_scale, right_scale, bias, dtype)
    left, left_scale = _extended(left, taken), _extended(left_scale, taken)
    return _scaled_mm(left, right, left_scale, right_scale, bias, dtype)[:rows]


@lru_cache(maxsize=SHAPES)
def rows_taken(
    device: torch.device, rows: int, inner: int, columns: int, dtype: torch.dtype, bias: bool
) -> int | None:
    """How many rows make a product that the device's library computes; None: no number does."""
    for count in (rows, *(more for more in MORE_ROWS if more > rows)):
        left, right = (
            torch.zeros(n, inner, dtype=torch.float8_e4m3fn, device=device)
            for n in (count, columns)
        )
        left_scale, right_scale = (torch.ones(n, 1, device=device) for n in (count, columns))
        added = torch.zeros(columns, dtype=dtype, device=device) if bias else None
        try:
            _scaled_mm(left, right, left_scale, right_scale, added, dtype)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            reason = str(error)
        else:
            return count
    shape = f"[{rows}, {inner}] x [{inner}, {columns}]"
    logger.warning("float8: %s is multiplied in %s instead (%s)", shape, dtype, reason)
    return None


def _scaled_mm(
    left: Tensor,
    right: Tensor,
    left_scale: Tensor,
    right_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    late = bias if dtype == torch.float32 else None  # which torch does not add to fp32 itself
    product = torch._scaled_mm(
        left,
        right.T,
        scale_a=left_scale,
        scale_b=right_scale.T,
        bias=None if late is not None else bias,
        out_dtype=dtype,
        use_fast_accum=True,
    )
    return product if late is None else product + late


def _extended(values: Tensor, rows: int) -> Tensor:
    """With rows of zeros at its end."""
    found = torch.zeros(rows, values.shape[1], dtype=values.dtype, device=values.device)
    found[: values.shape[0]].copy_(values)
    return found


LIBRARY = torch.library.Library("flux_fine_tune", "DEF")  # type: ignore[no-untyped-call]
LIBRARY.define(  # type: ignore[no-untyped-call]
    "multiply(Tensor left, Tensor right, Tensor left_scale, Tensor right_scale, Tensor? bias, "
    "ScalarType dtype) -> Tensor"
)
LIBRARY.impl("multiply", multiply, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


@torch.library.register_fake("flux_fine_tune::multiply", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _without_values(left: Tensor, right: Tensor, *others: Any) -> Tensor:  # noqa: ANN401
    """The operator's result without values, for the compiler."""
    *_, dtype = others
    return left.new_empty(left.shape[0], right.shape[0], dtype=dtype)


@Float8Weight.implements(torch.ops.aten._pin_memory.default)  # type: ignore[untyped-decorator]
def _pin_memory(
    _function: object, _types: object, arguments: tuple[Any, ...], _options: object
) -> Float8Weight:
    """Page-lock a weight; torchao's own answer is of its class, and would lose `_linear`."""
    weight: Float8Weight = arguments[0]._apply_fn_to_data(Tensor.pin_memory)
    return weight


@Float8Weight.implements(torch.ops.aten.linear.default)  # type: ignore[untyped-decorator]
@Float8Weight.implements_torch_function(nn.functional.linear)  # type: ignore[untyped-decorator]
def _linear(
    _function: object, _types: object, arguments: tuple[Any, ...], options: dict[str, Any]
) -> Tensor:
    return _linear_of(*arguments, **options)


def _linear_of(input: Tensor, weight: Float8Weight, bias: Tensor | None = None) -> Tensor:  # noqa: A002
    """`torch.nn.functional.linear`, with its names."""
    how = weight.act_quant_kwargs
    quantized = Float8Tensor.from_hp(
        input,
        how.float8_dtype,
        how.granularity,
        hp_value_lb=how.hp_value_lb,
        kernel_preference=how.kernel_preference,
    )
    product: Tensor = torch.ops.flux_fine_tune.multiply(
        quantized.qdata.reshape(-1, input.shape[-1]),
        weight.qdata,
        quantized.scale.reshape(-1, 1),
        weight.scale,
        bias,
        input.dtype,
    )
    return product.reshape(*input.shape[:-1], weight.shape[0])
