"""The kernel: on a CPU by Triton's interpreter, for a card by its compiler, and on a card."""

import pytest
import torch

from flux.transformers.one_pass import one_pass
from tests.flux.low_rank import COMPONENT, assert_rounded, base, bits, factors, same, working
from tests.flux.low_rank import whole as adapter
from tests.support.process import run_python

REASON = "Triton is in requirements-dev.txt, and has wheels for Linux only"


def test_interpreted(tmp_path) -> None:
    pytest.importorskip("triton", reason=REASON)
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/flux/interpreted.py"]
    assert "passed" in run_python(*tests, TRITON_INTERPRET="1", TRITON_CACHE_DIR=str(tmp_path))


def test_compiled_for_cards(tmp_path) -> None:
    """Triton brings all that this takes, ptxas too, and needs no card for it."""
    pytest.importorskip("triton", reason=REASON)
    here = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    printed = run_python("tests/flux/compiled.py", **here)
    assert printed.split() == ["80", "90"]


SHAPES = {
    "to_q": (3072, 3072),
    "proj_mlp": (12288, 3072),
    "proj_out": (3072, 15360),
    "norm": (18432, 3072),
}


@pytest.mark.gpu
@pytest.mark.parametrize("float8", [False, True], ids=["bf16", "fp8"])
def test_real_shapes_on_a_card(float8) -> None:
    """Exact, the same in any order, never waited for when warm, and undone to the bit."""
    device = torch.device("cuda")
    values = {name: base(*shape).to(device) for name, shape in SHAPES.items()}
    both = [
        {name: factors(*shape, rank, torch.bfloat16, rank) for name, shape in SHAPES.items()}
        for rank in (16, 33)
    ]
    a, b = (adapter(str(n), **deltas) for n, deltas in enumerate(both))
    merging = one_pass(device, 4 << 30)
    assert merging
    weights, found = working(values, merging, float8=float8)
    weights.reconcile([])
    restored = bits(found)
    weights.reconcile([(a, 0.8), (b, -1.2)])
    first = bits(found)
    for name, weight in found.items():
        deltas = [(d[name], s) for d, s in zip(both, (0.8, -1.2), strict=True)]
        on_card = [(type(d)(d.up.to(device), d.down.to(device), d.scaling), s) for d, s in deltas]
        assert_rounded(weight, values[name], on_card)
    weights.reconcile([(a, 1.0)])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        weights.reconcile([(b, -1.2), (a, 0.8)])
        assert not merging.failed
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert same(bits(found), first)
    weights.reconcile([])
    assert same(bits(found), restored)
    assert weights.fingerprint(COMPONENT) == ()
