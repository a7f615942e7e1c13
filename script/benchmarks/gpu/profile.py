"""Where the time of a step goes, by kind of kernel."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch.profiler import ProfilerActivity, profile

KINDS = {  # of kernels, by what their names contain; the first that matches
    "compiled (norms, rotations, quantizing, activations)": r"^triton",  # named after operators
    "copies": r"memcpy|memset",
    "attention": r"flash|fmha|attention|sdpa|mha_",
    "matrix products": r"gemm|nvjet|cutlass|xmma|wgmma|cublas|splitk|gemv|mm",
}
OTHER = "other"
SHOWN = 25


@dataclass(frozen=True)
class Span:
    """A kernel that ran: its name, and when, in microseconds."""

    name: str
    start: float
    end: float


def kernels(work: Callable[[], object], device: torch.device) -> list[Span]:
    """Run some work; return the kernels that it ran on the device, or operators on a CPU."""
    cuda = device.type == "cuda"
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        work()
        if cuda:
            torch.cuda.synchronize(device)
    wanted = "CUDA" if cuda else "CPU"
    return [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type.name == wanted
    ]


def kind(name: str) -> str:
    """What a kernel does, by its name."""
    found = (k for k, pattern in KINDS.items() if re.search(pattern, name.lower()))
    return next(found, OTHER)


def shares(spans: Iterable[Span], steps: int) -> dict[str, float]:
    """Milliseconds a step by kind of kernel, those in which none ran, and all together."""
    found: defaultdict[str, float] = defaultdict(float)
    reach = 0.0
    spans = sorted(spans, key=lambda span: span.start)
    for span in spans:
        found[f"{kind(span.name)}, ms"] += span.end - span.start
        if reach:
            found["gaps, ms"] += max(0.0, span.start - reach)
        reach = max(reach, span.end)
    found["a step, ms"] = reach - spans[0].start if spans else 0.0
    return {name: round(value / 1000 / steps, 3) for name, value in found.items()}


def longest(spans: Iterable[Span], steps: int) -> list[tuple[float, float, str]]:
    """The kernels that take most: milliseconds a step, calls a step, name."""
    total: defaultdict[str, float] = defaultdict(float)
    count = Counter[str]()
    for span in spans:
        total[span.name] += span.end - span.start
        count[span.name] += 1
    return [
        (round(time / 1000 / steps, 3), round(count[name] / steps, 1), name[:150])
        for name, time in sorted(total.items(), key=itemgetter(1), reverse=True)[:SHOWN]
    ]
