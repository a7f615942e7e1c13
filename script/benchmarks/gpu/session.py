"""What the steps of script/bench gpu share: a Predictor, set up as a server does it."""

import itertools
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.gpu import card
from benchmarks.gpu.steps import Results
from flux.memory.device import answers
from flux.memory.residency import Item
from flux.request import Inputs, Request, make_request
from flux.variants import Key
from lora.formats.adapter import Adapter
from predict import Predictor
from weights.serving.cancel import CheckCancelled
from weights.serving.settings import Settings
from weights.serving.timing import Stopwatch

PROMPT = "a red circle on a blue background, number {}"
STEPS = {"dev": 28, "schnell": 4}
GUIDANCE = 3.5
DEV, DEV8 = Key("dev", "bf16"), Key("dev", "fp8")

Adapters = list[tuple[Adapter, float]]


@dataclass(frozen=True)
class Generated:
    """An image, what it took, and the peak of memory beside what was allocated before, in GB."""

    image: Image.Image
    seconds: float
    step_ms: float
    stages: dict[str, float]
    peak_gb: float | None


class MeasuredPredictor(Predictor):
    """A predictor that keeps the metrics of its last request."""

    def __init__(self) -> None:
        self.metrics: dict[str, Any] = {}

    def record_metric(self, key: str, value: Any, *_: Any) -> None:
        """Keep a metric; outside of a server, Cog drops it."""
        self.metrics[key] = value


class Session:
    """What the steps share; they only exist in a worker.

    Args:
        out: the directory of the results.
        results: where figures go.
        checkpoint: a directory; None: a synthetic one is made.
        rehearse: everything is tiny, and on the CPU.
    """

    def __init__(self, out: Path, results: Results, checkpoint: str | None, rehearse: bool) -> None:
        self.out, self.results = out, results
        self.checkpoint, self.rehearse = checkpoint, rehearse
        cuda = torch.cuda.is_available() and not rehearse
        self.device = torch.device("cuda" if cuda else "cpu")
        self.predictor = MeasuredPredictor()
        self.files: list[Path] = []
        self.adapters: list[Adapters] = []
        self.graphs = 0  # made in setup
        self._numbers = itertools.count()

    def usable(self) -> bool:
        """Whether the device still answers; after a failed kernel it does not."""
        return answers(self.device)

    def record(self, step: str, figures: dict[str, Any], **details: Any) -> None:
        """Write figures, which the table shows, and details, which it does not."""
        self.results.add(step, figures=figures, **details)

    @property
    def engine(self) -> Any:
        """The predictor's."""
        return self.predictor._engine

    def call(self, work: Callable[[CheckCancelled], Any]) -> Any:
        """Run work in the engine thread, as every request is."""
        return self.predictor._thread.call(work)

    def prompt(self) -> str:
        """One that was not encoded yet."""
        return PROMPT.format(next(self._numbers))

    def request(self, *, steps: int | None = None, **inputs: Any) -> Request:
        """A request; dev's or schnell's steps, unless others are given."""
        model = inputs.setdefault("model", "dev")
        inputs["num_inference_steps"] = steps or (2 if self.rehearse else STEPS[model])
        found = make_request(
            Inputs(prompt=self.prompt(), seed=0, guidance_scale=GUIDANCE, **inputs), Settings()
        )
        if self.rehearse and not found.image:
            found = replace(found, width=found.width // 128 * 16, height=found.height // 128 * 16)
        return found

    def generate(
        self, request: Request, adapters: Adapters | None = None, *, eager: bool = False
    ) -> Generated:
        """Generate a request's first image."""
        stopwatch, cuda = Stopwatch(), self.device.type == "cuda"

        def work(check: CheckCancelled) -> Image.Image:
            with torch.compiler.set_stance("force_eager") if eager else nullcontext():
                return next(iter(self.engine.generate(request, adapters or [], stopwatch, check)))

        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
        start = time.perf_counter()
        image = self.call(work)
        seconds = time.perf_counter() - start
        stages = {name: round(value, 4) for name, value in stopwatch.seconds.items() if value}
        step_ms = 1000 * stopwatch.seconds["denoising"] / len(request.sigmas)
        peak = (torch.cuda.max_memory_allocated(self.device) - before) / 1e9 if cuda else None
        return Generated(image, seconds, step_ms, stages, peak and round(peak, 2))

    def series(
        self,
        step: str,
        name: str,
        rounds: int = 3,
        adapters: Adapters | None = None,
        *,
        eager: bool = False,
        **inputs: Any,
    ) -> Generated:
        """Generate some images after a short one; record the median, and return that image."""
        short = self.request(**{**inputs, "steps": 2})
        first = self.generate(short, adapters, eager=eager)
        runs = [self.generate(self.request(**inputs), adapters, eager=eager) for _ in range(rounds)]
        median = sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]
        self.record(
            step,
            {
                f"{name}, s": round(median.seconds, 3),
                f"{name}, step ms": round(median.step_ms, 2),
                f"{name}, peak GB beside weights": median.peak_gb,
            },
            runs=[round(run.seconds, 4) for run in runs],
            stages=median.stages,
            first_step_ms=round(first.step_ms, 2),
            compiled=not eager and self.engine.compiled(short),
        )
        return median

    def merge(self, key: Key, adapters: Adapters) -> float:
        """Seconds of a change of adapter."""
        work = partial(self.engine.merge, key, adapters)
        return float(self.call(lambda check: card.timed(lambda: work(check), self.device)))

    def evict(self, item: Item, *, for_good: bool = False) -> None:
        """Have weights leave the device; what leaves for good is then read from the host."""

        def work(_: CheckCancelled) -> None:
            self.engine._transformers._evict(item)
            if for_good:
                self.engine._transformers._residency.exclude(item)

        self.call(work)

    def clean(self) -> None:
        """Leave no adapter in any transformer on the device."""
        for key in self.engine._transformers.resident:
            self.merge(key, [])
