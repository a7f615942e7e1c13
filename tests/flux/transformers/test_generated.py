"""Compilation for a card, as far as it goes without one: inductor's kernels, and Triton's code."""

import pytest
import torch

from tests.support.process import run_python


@pytest.mark.skipif(torch.version.cuda is None, reason="torch without CUDA has no device guard")
def test_inductor_generates_every_block_of_flux_for_a_hopper_card(tmp_path) -> None:
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    here = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path)}
    lines = run_python("-m", "tests.flux.generated", TRITON_INTERPRET="0", **here).splitlines()
    kernels = {tuple(line.split()[:2]): int(line.split()[2]) for line in lines}
    blocks = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    assert set(kernels) == {(precision, block) for precision in ("bf16", "fp8") for block in blocks}
    assert min(kernels.values()) > 0
