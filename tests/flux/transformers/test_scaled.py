"""Float8 products, where a library that refuses shapes as cuBLASLt does plays CUDA's part."""

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from flux.transformers.float8 import empty_float8, quantize_into
from flux.transformers.scaled import MORE_ROWS, multiply

CPU = torch.device("cpu")
MODULATION = (1, 3072, 18432)  # rows, and both sides of the weight
TEXT_OF_SCHNELL = (256, 12288, 3072)


def matrices(rows: int, inner: int, columns: int) -> list[Tensor]:
    """Both factors with their scales, and a bias."""
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(n, inner, generator=generator) for n in (rows, columns)]
    scales = [torch.rand(n, 1, generator=generator) + 0.5 for n in (rows, columns)]
    values = [factor.to(torch.float8_e4m3fn) for factor in factors]
    return [*values, *scales, torch.randn(columns, generator=generator).bfloat16()]


def exact(left: Tensor, right: Tensor, left_scale: Tensor, right_scale: Tensor) -> Tensor:
    return (left.double() * left_scale) @ (right.double() * right_scale).T


@pytest.mark.parametrize(
    ("rows", "inner", "given"),
    [
        (1, 3072, 1),
        (127, 3072, 127),
        (1, 9216, MORE_ROWS[0]),
        (256, 9216, MORE_ROWS[0]),
        (257, 9216, 257),
    ],
)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_refused_shapes_are_given_more_rows(
    make_library, rows, inner, given, biased, dtype
) -> None:
    *found, bias = matrices(rows, inner, 32)
    bias = bias.to(dtype) if biased else None
    library = make_library()
    products = [multiply(*found, bias, dtype) for _ in range(3)]
    assert library.rows == [given] * 4  # tried once, and then known
    expected = exact(*found) + (bias.double() if biased else 0)
    for product in products:
        assert product.shape == (rows, 32)
        assert product.dtype == dtype
        error = (product.double() - expected).abs().amax() / expected.abs().amax()
        assert error < (2**-7 if dtype == torch.bfloat16 else 2**-18)


@pytest.mark.parametrize(("few", "given"), [(511, 512), (512, 528), (600, 1040)])
def test_a_library_may_refuse_more_than_is_known(make_library, few, given) -> None:
    *found, bias = matrices(512, 4096, 32)
    library = make_library(few=few)
    product = multiply(*found, bias, torch.bfloat16)
    assert library.rows == [given] * 2
    expected = exact(*found) + bias.double()
    assert (product.double() - expected).abs().amax() / expected.abs().amax() < 2**-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_the_library_never_takes_is_computed_all_the_same(make_library, caplog, dtype) -> None:
    """As on cards of capability 12, in several sizes; the log says so once for each shape."""
    library = make_library(least=1 << 20)
    for rows in (1, 300, 1):
        *found, bias = matrices(rows, 64, 32)
        product = multiply(*found, bias.to(dtype), dtype)
        expected = exact(*found) + bias.double()
        torch.testing.assert_close(product.double(), expected, rtol=2**-6, atol=0.1)
    assert library.rows == []
    assert caplog.text.count("[1, 64] x [64, 32] is multiplied in") == 1
    assert caplog.text.count("CUBLAS_STATUS_NOT_SUPPORTED") == 2


def test_a_lack_of_memory_is_not_taken_for_a_refusal(monkeypatch, make_library) -> None:
    def runs_out(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory (pretended)")

    *found, bias = matrices(5, 64, 32)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "_scaled_mm", runs_out)
        with pytest.raises(torch.OutOfMemoryError):
            multiply(*found, bias, torch.bfloat16)
    library = make_library()
    multiply(*found, bias, torch.bfloat16)
    assert library.rows == [5, 5]


def layer(inner: int, columns: int, device: torch.device = CPU) -> nn.Linear:
    """A linear in float8, in bfloat16 otherwise."""
    found = nn.Linear(inner, columns, device=device, dtype=torch.bfloat16).requires_grad_(False)
    weight = empty_float8(found.weight.shape, torch.bfloat16, device, dynamic=True)
    quantize_into(weight, found.weight)
    found.weight = nn.Parameter(weight, requires_grad=False)
    return found


def test_a_compiled_linear_takes_few_rows_and_many_in_one_graph(make_library) -> None:
    library, linear, graphs = make_library(), layer(4096, 32), CompileCounter()
    compiled = torch.compile(linear, backend=graphs, dynamic=True, fullgraph=True)
    for rows in (33, 300, 256, 17):
        inputs = torch.randn(1, rows, 4096).bfloat16()
        assert torch.equal(compiled(inputs), linear(inputs))
    assert graphs.frame_count == 1
    assert set(library.rows) == {MORE_ROWS[0], 300}


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [MODULATION, TEXT_OF_SCHNELL, (1, *TEXT_OF_SCHNELL[1:])], ids=str)
def test_shapes_of_flux_on_a_gpu(shape) -> None:
    """Those that a library may refuse."""
    *found, bias = (tensor.cuda() for tensor in matrices(*shape))
    product = multiply(*found, bias, torch.bfloat16)
    expected = exact(*found) + bias.double()
    assert (product.double() - expected).norm() / expected.norm() < 0.01
