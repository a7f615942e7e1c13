"""What a card and its host can do by themselves: bandwidths, matrix products, attention."""

import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.shared.report import machine

PACKAGES = (
    "triton",
    "transformers",
    "torchao",
    "huggingface_hub",
    "peft",
    "cog",
    "nvidia-cudnn-cu13",
)
QUERY = (
    "name,memory.total,driver_version,pcie.link.gen.max,pcie.link.width.max,clocks.max.sm,"
    "power.limit"
)
PRODUCTS = (  # tokens, and both sides of a weight; text alone, and with images of 512 and 1024
    (8192, 8192, 8192),
    *((tokens, 3072, columns) for tokens in (512, 1536, 4608) for columns in (3072, 9216, 12288)),
    (512, 12288, 3072),
    (4608, 15360, 3072),
)
AHEAD = 40_000_000  # cycles of a card, about 20 ms, in which the host queues what is timed
BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")


def seconds_of(work: Callable[[], object], device: torch.device, rounds: int = 10) -> float:
    """Median seconds of some work: by the card's events with CUDA, else by the clock.

    The card waits until the rounds are queued. Idle, it would count the host's time for a launch.
    """
    for _ in range(2):
        work()
    if device.type != "cuda":
        return statistics.median(timed(work, device) for _ in range(rounds))
    event = torch.cuda.Event
    pairs = [(event(enable_timing=True), event(enable_timing=True)) for _ in range(rounds)]
    torch.cuda._sleep(AHEAD)
    for begin, end in pairs:
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize(device)
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs) / 1000


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of some work, including what it has queued on the device."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe() -> dict[str, Any]:
    """The machine and the versions that figures depend on."""
    card = None
    if tool := shutil.which("nvidia-smi"):
        command = [tool, f"--query-gpu={QUERY}", "--format=csv,noheader"]
        card = subprocess.run(command, capture_output=True, text=True, check=False)
    return {
        **machine(),
        **{name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "card": card.stdout.strip() if card else None,
        "host_memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "free_gb": {
            path: round(shutil.disk_usage(path).free / 1e9)
            for path in ("/dev/shm", "/tmp")
            if Path(path).is_dir()
        },
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def bandwidths(device: torch.device) -> dict[str, float]:
    """Gigabytes a second: within the device, and from the host's two kinds of memory to it."""
    cuda = device.type == "cuda"
    size = 1 << (30 if cuda else 20)
    near, other = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    found = {
        "copy on the device, GB/s (read + write)": 2
        * size
        / seconds_of(lambda: near.copy_(other), device)
    }
    hosts = {"pageable": torch.zeros(size, dtype=torch.uint8)}
    if cuda:
        start = time.perf_counter()
        hosts["page-locked"] = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        found["page-lock with one thread, GB/s"] = size / (time.perf_counter() - start)
    for name, host in hosts.items():
        copying = lambda host=host: near.copy_(host, non_blocking=True)  # noqa: E731
        found[f"{name} host to device, GB/s"] = size / seconds_of(copying, device, 4)
    return {name: round(value / 1e9, 2) for name, value in found.items()}


def products(device: torch.device) -> dict[str, float | str]:
    """Tera-operations a second of FLUX.1's products and of a large one, in both precisions."""
    found: dict[str, float | str] = {}
    for tokens, inner, columns in PRODUCTS if device.type == "cuda" else ((32, 64, 48),):
        make = partial(torch.randn, device=device)
        left, right = make(tokens, inner).bfloat16(), make(columns, inner).bfloat16()
        scales = torch.ones(tokens, 1, device=device), torch.ones(1, columns, device=device)
        narrow = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn).t()
        options: dict[str, Any] = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
        for precision, multiply in (
            ("bf16", partial(F.linear, left, right)),
            ("fp8", partial(torch._scaled_mm, *narrow, *scales, **options)),
        ):
            name = f"{precision}, {tokens} x {inner} x {columns}, tera-op/s"
            try:
                seconds = seconds_of(multiply, device)
                found[name] = round(2 * tokens * inner * columns / seconds / 1e12, 1)
            except RuntimeError as error:
                found[name] = str(error)[:200]
    return found


def attention(device: torch.device) -> dict[str, float | str]:
    """Milliseconds of one block's attention for two sizes of image, by backend."""
    found: dict[str, float | str] = {}
    heads = 24 if device.type == "cuda" else 1
    for tokens in (4608, 1536) if device.type == "cuda" else (32,):
        shape = (1, tokens, heads, 128)
        q, k, v = (torch.randn(shape, device=device).bfloat16().transpose(1, 2) for _ in range(3))
        for backend in ("default", *BACKENDS):
            kernel = (
                nullcontext() if backend == "default" else sdpa_kernel(getattr(SDPBackend, backend))
            )
            attend = lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v)  # noqa: E731
            with kernel:
                name = f"{backend.lower()}, {tokens} tokens, ms"
                try:
                    found[name] = round(1000 * seconds_of(attend, device), 3)
                except RuntimeError as error:
                    found[name] = str(error)[:200]
    return found
