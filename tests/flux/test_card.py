"""What a card would do, as far as that shows without one; each in a process that pretends one."""

import pytest
import torch

from tests.support.process import run_python

pytestmark = pytest.mark.skipif(
    torch.version.cuda is None, reason="torch was built without CUDA, as fake tensors on it need"
)


@pytest.fixture(autouse=True)
def triton(monkeypatch, tmp_path) -> None:
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for cache in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(cache, str(tmp_path))


def test_inductor_generates_every_block_of_flux_for_a_hopper_card() -> None:
    lines = run_python("-m", "tests.flux.generated").splitlines()
    kernels = {tuple(line.split()[:2]): int(line.split()[2]) for line in lines}
    blocks = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    assert set(kernels) == {(precision, block) for precision in ("bf16", "fp8") for block in blocks}
    assert min(kernels.values()) > 0
    assert kernels["fp8", blocks[1]] <= 7  # eight: GELU twice, for amplitudes and to quantize


def test_no_operator_meets_tensors_on_two_devices() -> None:
    """In each mode, variant and precision, with adapters of each kind, and with offloading."""
    done = [line.split() for line in run_python("-m", "tests.flux.devices").splitlines()]
    assert {mode for _, _, _, mode in done} == {"TEXT_TO_IMAGE", "IMAGE_TO_IMAGE", "INPAINT"}
    assert {key for _, _, key, _ in done} == {"dev-bf16", "dev-fp8", "schnell-bf16", "schnell-fp8"}
    assert {offload for offload, *_ in done} == {"none", "t5", "all"}
    assert {device for _, device, *_ in done} == {"cuda:0"}
