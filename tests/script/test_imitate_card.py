"""The package on an imitated card: torch's own CUDA code runs it (script/imitate-card)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
NOT_IMITATED = (  # Triton's kernels; and a test that keeps a real card busy
    "tests/flux/transformers/test_lora_kernel.py",
    "tests/flux/memory/test_staging.py",
)
MEMORY = "tests/predictor/test_memory.py"
FACTS = """
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

stream = torch.cuda.Stream()
source, target = torch.ones(8).pin_memory(), torch.zeros(8, device="cuda")
with torch.cuda.stream(stream):
    target.copy_(source, non_blocking=True)
print("before anything waits:", float(target.sum()))
torch.cuda.current_stream().wait_stream(stream)
print("after:", float(target.sum()))
try:
    torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
except torch.OutOfMemoryError:
    print("out of memory")
tokens = torch.randn(1, 2, 64, 64)
for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
    with sdpa_kernel(backend):
        found = scaled_dot_product_attention(*[tokens.bfloat16().cuda()] * 3)
    torch.testing.assert_close(found.cpu().float(), scaled_dot_product_attention(*[tokens] * 3),
                               atol=0.05, rtol=0)
"""

pytestmark = [
    pytest.mark.skipif(torch.version.cuda is None, reason="this torch is built without CUDA"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler on this machine"),
]


def on_imitated_card(*arguments: str, **environment: str) -> str:
    """Run Python on the card; return what it wrote."""
    result = subprocess.run(
        [ROOT / "script/imitate-card", sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_copies_come_late_memory_ends_and_each_backend_attends() -> None:
    assert on_imitated_card("-c", FACTS, IMITATED_CARD_GB="1").splitlines() == [
        "before anything waits: 0.0",
        "after: 8.0",
        "out of memory",
    ]


@pytest.mark.parametrize(  # a minute each, as bf16 is slow on a CPU
    "chosen",
    [
        ("tests/flux",),
        (MEMORY, "-k", "not both_variants"),
        *((MEMORY, "-k", f"both_variants and {offload}") for offload in ("none", "t5", "all")),
    ],
    ids=" ".join,
)
def test_what_needs_a_card_passes_on_it(chosen: tuple[str, ...]) -> None:
    left_out = [word for path in NOT_IMITATED for word in ("--ignore", path)]
    command = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *left_out]
    output = on_imitated_card(*command, *chosen)
    assert "passed" in output
    assert "skipped" not in output
