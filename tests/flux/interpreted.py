"""The kernel of flux/transformers/lora_kernel.py on a CPU; test_lora_kernel.py runs this file.

It takes Triton's interpreter, which has to be chosen before Triton is imported.
"""

import copy

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from flux.transformers.lora_kernel import write
from flux.transformers.merge import WorkingWeights
from flux.transformers.one_pass import MAX_RANK, OnePass
from tests.flux.low_rank import (
    adapter,
    assert_rounded,
    base,
    bits,
    factors,
    same,
    whole,
    working,
)
from tests.flux.merging import SIZE, state
from tests.support import tiny

DTYPES = {
    tl.float32: torch.float32,
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float8e4nv: torch.float8_e4m3fn,
}
FORMS = {
    "bf16": {"dtype": torch.bfloat16},
    "fp32": {"dtype": torch.float32},
    "fp8": {"float8": True},
}
pytestmark = pytest.mark.filterwarnings(  # numpy's, about the interpreter of Triton 3.6
    "ignore:Conversion of an array with ndim > 0:DeprecationWarning"
)
FP32 = {"rtol": 1e-5, "atol": 1e-4}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def converted(values, source, target, mode):
    """As a card converts, and torch: to the nearest. The interpreter itself cuts off."""
    raw = np.ascontiguousarray(values).view(f"i{source.primitive_bitwidth // 8}")
    found = torch.from_numpy(raw.copy()).view(DTYPES[source]).to(DTYPES[target])
    unsigned = found.contiguous().view(getattr(torch, f"uint{target.primitive_bitwidth}"))
    return unsigned.numpy().reshape(values.shape)


@pytest.fixture(autouse=True)
def _to_the_nearest(monkeypatch):
    monkeypatch.setattr(interpreter, "_convert_float", converted)


class Kernel:
    """The kernel, which counts what it writes."""

    def __init__(self):
        self.written = 0

    def __call__(self, *arguments):
        self.written += 1
        assert write(*arguments)
        return True


def merged(values, desired, **form):
    """Weights by the kernel, and by torch's operators; how many the kernel wrote."""
    kernel = Kernel()
    weights, found = working(values, OnePass(kernel, 1 << 30, lambda tensor: tensor), **form)
    weights.reconcile(desired)
    weights, reference = working(values, **form)
    weights.reconcile(desired)
    return found, reference, kernel.written


def assert_close(found, reference):
    """Sums in another order are rounded differently now and then, to a neighbour.

    Where terms cancel, what fp32 loses may be more than one step of the small sum.
    """
    for name, tensors in bits(found).items():
        weight, expected = found[name], reference[name]
        quantized = hasattr(weight, "qdata")
        if weight.dtype == torch.float32 and not quantized:
            torch.testing.assert_close(weight, expected, **FP32)
            continue
        if quantized:
            torch.testing.assert_close(weight.scale, expected.scale, rtol=1e-5, atol=0)
        kind = torch.uint8 if quantized else torch.int16
        one, other = (t.view(kind).int() for t in (tensors[0], bits(reference)[name][0]))
        neighbours = (one - other).abs() <= 1
        if not quantized:
            neighbours |= torch.isclose(weight.float(), expected.float(), **FP32)
        assert neighbours.all()
        assert (one != other).float().mean() < 0.01


@forms
@pytest.mark.parametrize(
    ("rows", "columns", "rank", "dtype"),
    [
        (1, 1, 1, torch.float32),
        (7, 300, 1, torch.bfloat16),
        (65, 129, 2, torch.float16),
        (64, 128, 16, torch.bfloat16),
        (130, 48, 17, torch.float32),
        (33, 257, 33, torch.bfloat16),
        (16, 96, 300, torch.float16),
    ],
)
def test_any_shape_rank_and_dtype(rows, columns, rank, dtype, form):
    values = {"w": base(rows, columns)}
    delta = factors(rows, columns, rank, dtype)
    found, reference, written = merged(values, [(whole("a", w=delta), -0.7)], **form)
    assert written == 1
    assert_rounded(found["w"], values["w"], [(delta, -0.7)])
    assert_close(found, reference)


@forms
def test_three_adapters_are_one_delta_in_any_order(form):
    values = {"w": base(40, 70)}
    kinds = [(5, torch.bfloat16, 0.8), (16, torch.float16, -1.3), (30, torch.float32, 0.1)]
    deltas = [(factors(40, 70, rank, dtype, rank), scale) for rank, dtype, scale in kinds]
    desired = [(whole(str(n), w=delta), scale) for n, (delta, scale) in enumerate(deltas)]
    found, reference, written = merged(values, desired, **form)
    assert written == 1
    assert_rounded(found["w"], values["w"], deltas)
    assert_close(found, reference)
    assert same(bits(found), bits(merged(values, desired[::-1], **form)[0]))


@forms
@pytest.mark.parametrize("ranks", [(256, 256), (256, 257)], ids=str)
def test_ranks_up_to_the_limit(ranks, form):
    values = {"w": base(20, 50)}
    deltas = [factors(20, 50, rank, torch.bfloat16, rank) for rank in ranks]
    desired = [(whole(str(n), w=delta), 0.5) for n, delta in enumerate(deltas)]
    found, reference, written = merged(values, desired, **form)
    assert written == (sum(ranks) <= MAX_RANK)
    assert_rounded(found["w"], values["w"], [(delta, 0.5) for delta in deltas])
    assert written or same(bits(found), bits(reference))


@forms
def test_rows_of_a_fused_delta(form):
    """Parameters that each get some rows, and one of them only in its middle."""
    values = {"q": base(24, 40), "k": base(30, 40), "v": base(20, 40)}
    delta = factors(70, 40, 6, torch.bfloat16)
    rows = {
        "q": (slice(0, 24), slice(0, 24)),
        "k": (slice(24, 54), slice(0, 30)),
        "v": (slice(54, 60), slice(7, 13)),
    }
    fused = adapter("a", **{name: (delta, *pair) for name, pair in rows.items()})
    found, reference, written = merged(values, [(fused, 1.0)], **form)
    assert written == 3
    assert_close(found, reference)
    untouched, _, _ = merged(values, [], **form)
    outside = [*range(7), *range(13, 20)]
    for after, before in zip(bits(found)["v"], bits(untouched)["v"], strict=True):
        assert torch.equal(after[outside], before[outside])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@forms
def test_what_is_not_finite_shows_as_before(form, value):
    values = {"w": base(20, 40)}
    values["w"][3, 7] = value
    found, reference, _ = merged(values, [(whole("a", w=factors(20, 40, 4)), 1.0)], **form)
    plain = [getattr(w["w"], "qdata", w["w"]).float() for w in (found, reference)]
    torch.testing.assert_close(*plain, equal_nan=True, rtol=0.1, atol=0.1)
    assert not plain[0][3, 7].isfinite()
    assert plain[0][4].isfinite().all()


def test_a_float8_weight_without_adapters_is_what_it_was_before():
    values = {"q": base(37, 80)}
    values["q"][3] = 0
    values["q"][5, ::2] = -0.0
    kernel = Kernel()
    merging = OnePass(kernel, 1 << 30, lambda tensor: tensor)
    weights, found = working(values, merging, float8=True)
    weights.reconcile([])
    before = bits(found)
    weights.reconcile([(whole("a", q=factors(37, 80, 4, torch.bfloat16)), 1.0)])
    assert not same(bits(found), before)
    weights.reconcile([])
    assert same(bits(found), before)
    assert kernel.written == 2


def test_rows_of_zeros_are_zeros():
    values = {"w": torch.zeros(20, 40, dtype=torch.bfloat16)}
    delta = factors(20, 40, 4)
    delta.up[::2] = 0
    found, _, _ = merged(values, [(whole("a", w=delta), 1.0)], float8=True)
    assert_rounded(found["w"], values["w"], [(delta, 1.0)])
    assert (found["w"].qdata[::2].float() == 0).all()
    assert (found["w"].scale[::2] == torch.finfo(torch.float32).tiny).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_adapters_from_files_of_every_kind(adapters, dtype):
    """Fused ones, biases, DoRA and LoKr among them; then all is as it was, to the bit."""
    modules = tiny.modules(SIZE, dtype)
    before, reference = state(modules), copy.deepcopy(modules)
    kernel = Kernel()
    weights = WorkingWeights(modules, one_pass=OnePass(kernel, 1 << 30, lambda tensor: tensor))
    other = WorkingWeights(reference)
    step = 2**-7 if dtype == torch.bfloat16 else 1e-5
    for names in ("a", "b", "ab", "c", "abcd"):
        desired = [(adapters[name], 0.7) for name in names]
        assert weights.reconcile(desired) == other.reconcile(desired)
        for key, value in state(reference).items():
            torch.testing.assert_close(state(modules)[key], value, rtol=step, atol=1e-5)
    assert kernel.written > 10
    weights.reconcile([])
    after = state(modules)
    assert all(torch.equal(after[key], before[key]) for key in before)
