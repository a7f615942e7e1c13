"""Float8 weights: numerics against float64 and torchao's own, storage, and which weights."""

import copy
import logging

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchao.quantization import Float8WeightOnlyConfig, PerRow, quantize_
from torchao.quantization.quantize_.workflows import Float8Tensor

from flux.transformers.float8 import (
    empty_float8,
    float8_parameters,
    quantize_into,
    quantizes_activations,
    storage,
)
from tests.support import tiny
from weights.serving.settings import SettingsError

CPU = torch.device("cpu")
ROWS, COLUMNS = 96, 64


@pytest.fixture
def weight() -> torch.Tensor:
    """[96, 64], with outliers, and rows of very different size."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=generator) / COLUMNS**0.5
    weight[::7, ::5] *= 30
    return weight * torch.logspace(-6, 3, ROWS)[:, None]


def quantized(weight, dtype=torch.float32, dynamic=False) -> Float8Tensor:
    result = empty_float8(weight.shape, dtype, CPU, dynamic=dynamic)
    quantize_into(result, weight)
    return result


def linear(weight: torch.Tensor, dtype: torch.dtype, dynamic: bool) -> nn.Linear:
    layer = nn.Linear(COLUMNS, ROWS).to(dtype).requires_grad_(False)
    layer.bias.copy_(torch.linspace(-1, 1, ROWS))
    layer.weight = nn.Parameter(quantized(weight, dtype, dynamic), requires_grad=False)
    return layer


def bits(parameter: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.view(torch.uint8) for tensor in storage(parameter)]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return all(torch.equal(x, y) for x, y in zip(bits(a), bits(b), strict=True))


def test_every_value_is_the_nearest_of_e4m3(weight) -> None:
    found = quantized(weight)
    exact, scale = weight.double(), found.scale.double()
    error = (found.qdata.double() * scale - exact).abs()
    half_step = torch.maximum(exact.abs() * 2**-4, scale * 2**-10)  # 3 bits; and the subnormals
    assert (error <= half_step * (1 + 1e-6)).all()
    assert (found.qdata.double().abs().amax(dim=1) == 448).all()


def test_the_bits_are_torchaos_own(weight) -> None:
    theirs = nn.Linear(COLUMNS, ROWS, bias=False)
    theirs.weight = nn.Parameter(weight.clone(), requires_grad=False)
    quantize_(theirs, Float8WeightOnlyConfig())
    assert same_bits(quantized(weight), theirs.weight)


class DividesAsCuda(TorchDispatchMode):
    """Divides by a number as CUDA does, by its reciprocal (BinaryDivTrueKernel.cu)."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None) -> object:
        divides = function in (torch.ops.aten.div.Tensor, torch.ops.aten.div_.Tensor)
        if divides and (not isinstance(arguments[1], torch.Tensor) or arguments[1].dim() == 0):
            found = arguments[0].mul((1 / torch.tensor(arguments[1], dtype=torch.float32)).item())
            return arguments[0].copy_(found) if function is torch.ops.aten.div_.Tensor else found
        return function(*arguments, **options or {})


def test_the_bits_are_the_same_where_a_number_divides_as_on_cuda(weight) -> None:
    """Files that were quantized on a CPU take turns with weights that a card quantizes."""
    here = quantized(weight)
    with DividesAsCuda():
        assert not torch.equal(weight / 448, torch.div(weight, torch.full_like(weight, 448)))
        there = quantized(weight)
    assert same_bits(here, there)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dynamic", [False, True], ids=["weights", "activations too"])
def test_a_linear_against_float64(weight, dtype, dynamic) -> None:
    layer = linear(weight, dtype, dynamic)
    inputs = torch.randn(2, 9, COLUMNS, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = layer(inputs)
    assert found.dtype == dtype
    exact = inputs.double()
    if dynamic:
        amplitude = inputs.abs().amax(dim=-1, keepdim=True)
        scale = (amplitude / 448).double()  # in the input's dtype, as torchao takes it
        exact = (exact / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale
    product = exact @ (layer.weight.qdata.double() * layer.weight.scale.double()).T
    reference = product + layer.bias.double()
    limit = (2**-20 if dtype == torch.float32 else 2**-6) * reference.abs().amax(dim=(0, 1))
    assert ((found.double() - reference).abs() <= limit).all()
    unquantized = inputs.double() @ weight.double().T + layer.bias.double()
    assert ((found.double() - unquantized).norm() / unquantized.norm()) < 0.05


def test_the_dynamic_form_is_torchaos_own(weight) -> None:
    ours = linear(weight, torch.float32, dynamic=True)
    theirs = copy.deepcopy(ours)
    mine = ours.weight
    theirs.weight = nn.Parameter(
        Float8Tensor.from_hp(
            weight,
            granularity=PerRow(),
            mm_config=mine.mm_config,
            kernel_preference=mine.kernel_preference,
            act_quant_kwargs=mine.act_quant_kwargs,
        ),
        requires_grad=False,
    )
    inputs = torch.randn(9, COLUMNS)
    try:
        expected = theirs(inputs)
    except RuntimeError:
        pytest.skip("torch 2.11 does not multiply row by row on a CPU")
    assert torch.equal(ours(inputs), expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_zeros_are_zeros(weight, dynamic) -> None:
    """Where torchao's own give NaN: a row of zeros, and a token of zeros."""
    weight[3] = 0
    layer = linear(weight, torch.float32, dynamic)
    inputs = torch.randn(4, COLUMNS)
    inputs[2] = 0
    found = layer(inputs)
    assert found.isfinite().all()
    assert (found[:, 3] == layer.bias[3]).all()
    assert (found[2] == layer.bias).all()


def test_writing_again_keeps_the_storage(weight) -> None:
    found = quantized(weight)
    pointers = [tensor.data_ptr() for tensor in storage(found)]
    quantize_into(found, -weight.bfloat16())
    assert [tensor.data_ptr() for tensor in storage(found)] == pointers
    assert same_bits(found, quantized(-weight.bfloat16()))


def test_weights_of_the_blocks_and_no_others() -> None:
    """FLUX.1-dev at its real width and depth, without memory."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    found = float8_parameters(model)
    linears = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    kept = {name.removesuffix(".weight") for name in linears - found}
    embedders = {name for name in kept if name.startswith("time_text_embed.")}
    assert len(embedders) == 6
    assert kept - embedders == {"x_embedder", "context_embedder", "norm_out.linear", "proj_out"}
    assert len(found) == 19 * 14 + 38 * 6
    assert "single_transformer_blocks.37.proj_out.weight" in found


def test_a_side_that_cuda_cannot_multiply_stays_as_it_is() -> None:
    found = tiny.modules(tiny.SIZES[1])["transformer"]  # 24 wide
    assert float8_parameters(found) == frozenset()


@pytest.mark.parametrize(("choice", "dynamic"), [("auto", False), ("bf16", False), ("fp8", True)])
def test_a_cpu_is_told_what_it_gains(caplog, choice, dynamic) -> None:
    caplog.set_level(logging.INFO, "flux")
    assert quantizes_activations(choice, CPU, torch.float32) is dynamic
    assert "saves memory, not time" in caplog.text


@pytest.mark.parametrize(
    ("capability", "taken", "dynamic"),
    [((9, 0), 512, True), ((8, 9), 512, True), ((8, 6), 512, False), ((12, 0), None, False)],
)
def test_activations_are_quantized_where_the_card_multiplies_them(
    monkeypatch, capability, taken, dynamic
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr("flux.transformers.float8.rows_taken", lambda *_, **__: taken)
    cuda = torch.device("cuda")
    assert quantizes_activations("auto", cuda, torch.bfloat16) is dynamic
    assert not quantizes_activations("auto", cuda, torch.float32)
    if not dynamic:
        with pytest.raises(SettingsError, match="cannot multiply in float8"):
            quantizes_activations("fp8", cuda, torch.bfloat16)


@pytest.mark.gpu
def test_a_linear_on_a_gpu(weight) -> None:
    device = torch.device("cuda")
    dynamic = quantizes_activations("auto", device, torch.bfloat16)
    weight, inputs = weight.bfloat16(), torch.randn(9, COLUMNS).bfloat16()
    found = empty_float8(weight.shape, torch.bfloat16, device, dynamic=dynamic)
    quantize_into(found, weight)
    assert same_bits(found.cpu(), quantized(weight, torch.bfloat16, dynamic))
    layer = linear(weight, torch.bfloat16, dynamic)
    answer = nn.functional.linear(inputs.to(device), found, layer.bias.to(device)).cpu()
    torch.testing.assert_close(answer, layer(inputs), rtol=0.05, atol=0.05)
