"""Compiling the blocks or the whole transformer, with an empty and with a kept cache.

Every case runs in a process of its own, as a server's start does. Seconds are those of the clock
and of the processor (compilers included): the latter do not depend on who else is on the machine.
One more process traces the blocks again and again, without each of our settings of the tracer, in
turns.
With `--json FILE` a plot goes beside it, as FILE with the suffix .png.
"""

import multiprocessing
import os
import resource
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.shared import full_depth
from benchmarks.shared.report import BLUE, GREY, chart, interleave, medians, parser, report
from flux.variants import Key

HEADS = 3
BLOCKS = (4, 8)  # a fifth of FLUX.1's: the whole takes longer with every block
TOKENS = (255, 63)  # of the image and the text: equal to no width, see flux/transformers/compile.py
OTHERS = ((64, 64), (192, 32), (1024, 64), (99, 256))  # requests after the first
KEY = Key("dev", "bf16")
ROUNDS = 9
TRACES = 5


@dataclass(frozen=True)
class Case:
    """What is compiled, with which cache."""

    regional: bool
    cache: Path


def main() -> None:
    file = parser().parse_args().json
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        results = {}
        for what, regional in (("blocks", True), ("whole", False)):
            case = Case(regional, Path(directory) / what)
            for state in ("empty cache", "kept cache"):
                results[f"{what}, {state}"] = in_a_process_of_its_own(start, case)
        blocks = Case(regional=True, cache=Path(directory) / "blocks")
        traces = in_a_process_of_its_own(trace, blocks)
    report(
        "compile",
        {
            "model": full_depth.describe(model()),
            "tokens": TOKENS,
            "dtype": "float32",
            "rounds": ROUNDS,
            "starts": results,
            "traces": TRACES,
            "trace_times_ours": traces,
        },
        file,
    )
    chart(file, (11, 3), lambda figure: plot(figure, results))


def in_a_process_of_its_own(
    measure: Callable[[Case], dict[str, Any]], case: Case
) -> dict[str, Any]:
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh) as process:
        return process.submit(measure, case).result()


def model() -> torch.nn.Module:
    return full_depth.transformer(torch.float32, HEADS, BLOCKS)


def prepare(case: Case) -> Callable[..., object]:
    """In a new process: a step of the compiled transformer, with some numbers of tokens."""
    os.environ |= {
        "TORCHINDUCTOR_CACHE_DIR": str(case.cache),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # so that the compilers' seconds are counted
    }
    warnings.filterwarnings("ignore")
    from flux.transformers.compile import Compilation

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    found = model()
    compilation = Compilation({KEY: found} if case.regional else {})
    if not case.regional:
        found.compile(dynamic=True, fullgraph=True)

    def step(tokens: tuple[int, int] = TOKENS) -> object:
        inputs = full_depth.inputs(*tokens)
        return compilation.run(KEY, tokens[0], lambda: found(**inputs))

    return step


def start(case: Case) -> dict[str, Any]:
    """The first step, then other sizes, then steps beside eager ones."""
    step = prepare(case)
    from flux.transformers.compile import graphs

    clock, processor = time.perf_counter(), processor_seconds()
    step()
    clock, processor = time.perf_counter() - clock, processor_seconds() - processor
    first = graphs()
    for tokens in OTHERS:
        step(tokens)
    steps = {"compiled": step, "eager": torch.compiler.set_stance("force_eager")(lambda: step())}
    median = medians(interleave(steps, ROUNDS))
    return {
        "seconds": round(clock, 1),
        "processor_seconds": round(processor, 1),
        "graphs": first,
        "graphs_for_other_sizes": graphs() - first,
        "step_times_eager": round(median["compiled"] / median["eager"], 3),
    }


def trace(case: Case) -> dict[str, Any]:
    """The first step anew, kernels kept: what tracing takes without each of our settings."""
    step = prepare(case)
    from flux.transformers.compile import DYNAMO

    def anew(without: str | None) -> None:
        settings = {name: value for name, value in DYNAMO.items() if name != without}
        with mock.patch.dict(DYNAMO, settings, clear=True):
            torch._dynamo.reset()
            step()

    traces = {f"without {name}": partial(anew, name) for name in DYNAMO}
    median = medians(interleave(traces | {"ours": partial(anew, None)}, TRACES))
    ours = median.pop("ours")
    return {name: round(seconds / ours, 2) for name, seconds in median.items()}


def processor_seconds() -> float:
    """Of this process and those it has waited for."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def plot(figure: Any, starts: dict[str, dict[str, Any]]) -> None:
    """The seconds of each start, and the time of its steps."""
    panels = figure.subplots(1, 2, sharey=True)
    names = list(starts)[::-1]
    colours = [BLUE if name.startswith("blocks") else GREY for name in names]
    for axes, (what, title) in zip(
        panels,
        {
            "processor_seconds": "the first step, compilation included: processor seconds",
            "step_times_eager": "a step after it, times eager",
        }.items(),
        strict=True,
    ):
        values = [starts[name][what] for name in names]
        axes.bar_label(axes.barh(names, values, color=colours), padding=3)
        axes.set_title(title)
        axes.margins(x=0.1)


if __name__ == "__main__":
    main()
