"""What every benchmark shares: interleaved medians, the machine, and the report."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

BLUE, GREY = "#2a6fdb", "#9aa0a6"  # of charts: ours, and what it is measured against


def interleave(
    contenders: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of every contender, run in turn, so that a drifting machine meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(warmup + rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(runs) for name, runs in seconds.items()}


def machine() -> dict[str, Any]:
    """What a figure depends on and a reader needs to know."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # with its build, such as +cpu or +cu130
        "diffusers": version("diffusers"),
    }


def parser() -> argparse.ArgumentParser:
    """The command line of a benchmark; one with more options than `--json FILE` adds its own.

    It is parsed before anything is measured, so that a mistyped option costs nothing.
    """
    found = argparse.ArgumentParser()
    found.add_argument("--json", type=Path, metavar="FILE")
    return found


def chart(file: Path | None, size: tuple[float, float], draw: Callable[[Any], None]) -> None:
    """A chart beside the report, with the suffix .png, if the report goes to a file.

    Args:
        file: of the report.
        size: in inches.
        draw: takes the figure.
    """
    if not file:
        return
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=size, layout="constrained")
    draw(figure)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file.with_suffix(".png"), dpi=110)


def report(title: str, results: dict[str, Any], file: Path | None) -> None:
    """Print the results and the machine they are from; write them to a file if one is given."""
    document = {"benchmark": title, "machine": machine(), **results}
    text = json.dumps(document, indent=2)
    print(text)
    if file:
        file.write_text(text + "\n")
