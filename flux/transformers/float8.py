"""Float8 weights in the linears of the transformer's blocks, through torchao's Float8Tensor.

A weight is stored as e4m3 with one fp32 scale per row (output feature); activations are
quantized per row (token) at run time if the device multiplies in float8, else they are not. The
embedders, time_text_embed, norm_out and the final proj_out stay in the compute
dtype: they are half a per cent of FLUX.1's parameters, and would cause most of the output's error
(docs/fp8.md).

Weights are quantized here and not by torchao's `quantize_` for three reasons. A weight that
adapters change must be written in place, so that a compiled graph keeps its storage. The scale is
taken in fp32, from the exact sum of the base weight and the deltas, where torchao rounds it
to the weight's dtype, so that the largest value of a row may be clipped. And a row of zeros has
scale 0 in torchao, and so NaN for values. For the rest the bits are torchao's own on a CPU.

`flux/transformers/scaled.py` multiplies if activations are quantized too, because not every shape
has a kernel.
"""

import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torchao.float8.inference import Float8MMConfig
from torchao.quantization import PerRow
from torchao.quantization.quantize_.common import KernelPreference
from torchao.quantization.quantize_.workflows import Float8Tensor, QuantizeTensorToFloat8Kwargs

from flux.transformers.scaled import Float8Weight, rows_taken
from weights.serving.settings import SettingsError

logger = logging.getLogger(__name__)

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max  # 448
TINY = torch.finfo(torch.float32).tiny  # the least scale: a row of zeros is zeros
QUIET = 1e-12  # the least amplitude of a token that its scale is taken from
FLOAT8_CAPABILITY = (8, 9)  # CUDA cards from this on multiply in float8
USUAL = (512, 3072, 3072)  # rows, and both sides of a weight: FLUX.1's text, in its attention
MULTIPLE = 16  # both sides of a matrix, for float8 multiplication on CUDA


def quantizes_activations(choice: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the linears quantize their inputs too; the log says which and why.

    Args:
        choice: `fp8`, `bf16` (inputs stay as they are), or `auto`, which is fp8 where that is
            faster: on CUDA cards of capability 8.9 and up, computing in bfloat16, whose library
            multiplies with a scale for each row.
        device: where the transformer computes.
        dtype: of its activations.

    Raises:
        SettingsError: `fp8` on a device that cannot multiply in float8.
    """
    capable = device.type == "cpu"  # slow, but every form can be computed
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        capable = capability >= FLOAT8_CAPABILITY and dtype == torch.bfloat16
        capable = capable and rows_taken(device, *USUAL, dtype, bias=True) is not None
    if choice == "fp8" and not capable:
        raise SettingsError(
            f"FLUX_FP8_ACTIVATIONS=fp8: {device} computing in {dtype} cannot multiply in float8; "
            "that takes bfloat16, and a CUDA card of capability 8.9 or more, whose library "
            "multiplies with a scale for each row; use auto or bf16"
        )
    dynamic = capable and device.type == "cuda" if choice == "auto" else choice == "fp8"
    if dynamic and device.type == "cuda":
        logger.info("go_fast: float8 weights and activations")
    else:
        inputs = "float8" if dynamic else "unquantized"
        logger.info(
            "go_fast: float8 weights, %s activations: on this device that saves memory, not time",
            inputs,
        )
    return dynamic


def float8_parameters(transformer: nn.Module) -> frozenset[str]:
    """Names of the weights to hold in float8: of every linear inside the blocks.

    Linears with a side that is no multiple of 16 are left out: CUDA cannot multiply them.
    """
    blocks = {
        f"{group}.{name}": module
        for group in ("transformer_blocks", "single_transformer_blocks")
        for name, module in transformer.get_submodule(group).named_modules()
    }
    return frozenset(
        f"{name}.weight"
        for name, module in blocks.items()
        if isinstance(module, nn.Linear)
        and module.in_features % MULTIPLE == 0
        and module.out_features % MULTIPLE == 0
    )


def empty_float8(
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    *,
    dynamic: bool,
    values: Tensor | None = None,
) -> Float8Tensor:
    """Memory for a weight of `shape` = [rows, columns], not written yet.

    Args:
        shape: of the weight.
        dtype: that the linear computes and answers in.
        device: where the memory is.
        dynamic: whether the linear quantizes its inputs, per row.
        values: memory for the values, FLOAT8; by default new memory on the device.
    """
    rows, columns = shape
    kernels = KernelPreference.TORCH  # AUTO changes with the packages that are installed
    activations = QuantizeTensorToFloat8Kwargs(
        FLOAT8, PerRow(), hp_value_lb=QUIET, kernel_preference=kernels
    )
    return (Float8Weight if dynamic else Float8Tensor)(
        torch.empty(shape, dtype=FLOAT8, device=device) if values is None else values,
        torch.empty(rows, 1, dtype=torch.float32, device=device),
        block_size=[1, columns],
        mm_config=Float8MMConfig(use_fast_accum=True),
        act_quant_kwargs=activations if dynamic else None,
        kernel_preference=kernels,
        dtype=dtype,
    )


def quantize_into(working: Float8Tensor, exact: Tensor) -> None:
    """Quantize `exact` [rows, columns], any floating dtype and device, into the same storage.

    scale = max |row| / 448 in fp32, values = round(row / scale) to e4m3. Where CUDA divides by a
    number, it multiplies by the reciprocal, which rounds otherwise; so 448 is a tensor.
    """
    exact = exact.to(working.device)  # in the source's dtype: less to carry
    amplitude = exact.abs().amax(dim=1, keepdim=True).float()
    largest = torch.full_like(amplitude, LARGEST)
    working.scale.copy_(amplitude.div_(largest).clamp_(min=TINY))
    scaled = exact.float().div(working.scale).clamp_(-LARGEST, LARGEST)
    working.qdata.copy_(scaled)


def store(working: Tensor, exact: Tensor) -> None:
    """Put an exact value into a working weight in place, float8 or not; see `merge.Store`."""
    if isinstance(working, Float8Tensor):
        quantize_into(working, exact)
    else:
        working.copy_(exact)


def storage(parameter: Tensor) -> Iterator[Tensor]:
    """The plain tensors that hold a parameter."""
    if isinstance(parameter, Float8Tensor):
        yield from (parameter.qdata, parameter.scale)
    else:
        yield parameter
