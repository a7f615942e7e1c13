"""Whole images against plain diffusers, with and without an adapter, and changes of adapter.

On a CUDA machine with the official checkpoints it runs as it is: dev with 28 steps and schnell with
4 at 1024 x 1024, in both precisions. Ours and diffusers' pipeline share VAE and text encoders; each
has transformers of its own on the device: 70 GB together, so it takes a card of 80. All encode a
prompt that they have not seen, and end with a Pillow image. The adapter is made here: random, rank
16, on every linear of the transformer. A cold swap reads, checks and parses its file anew (from the
page cache), a warm one finds it parsed.

To try the code without a card:
    script/bench gpu --checkpoint nano --device cpu --size 256 --steps 2 --rounds 1
"""

import argparse
import itertools
import logging
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import _full_depth as full_depth
import torch
from common import interleave, medians, parser, publish
from diffusers import FluxPipeline, FluxTransformer2DModel

from flux.compile import compile_blocks
from flux.deployment import Deployment, sources_of
from flux.engine import Engine
from flux.load import load_pipelines, working_transformers
from flux.request import Inputs, Precision, resolve
from flux.residency import BudgetError
from flux.timing import Stopwatch
from flux.transformers import Transformers
from flux.variants import VARIANTS
from lora.adapter import Adapter, Targets, load_adapter
from weights.checkpoint import is_there
from weights.inventory import GB, Inventory
from weights.manifest import REPOSITORIES
from weights.retry import never_cancelled as never
from weights.settings import Settings

STEPS = {"dev": 28, "schnell": 4}
PRECISIONS: tuple[Precision, ...] = ("bf16", "fp8")
PLAIN = "diffusers, bf16"
GUIDANCE = 3.5

Adapters = list[tuple[Adapter, float]]


def main() -> int:
    options = parser()
    options.add_argument("--checkpoint", default="official", help="default: official")
    options.add_argument("--device", default="cuda", help="default: cuda")
    options.add_argument("--size", type=int, default=1024, help="pixels a side; default: 1024")
    options.add_argument("--steps", type=int, help="default: 28 for dev, 4 for schnell")
    options.add_argument("--rounds", type=int, default=5, help="default: 5")
    arguments = options.parse_args()
    settings = replace(
        Settings.from_environment(), checkpoint=arguments.checkpoint, device=arguments.device
    )
    if reason := why_not(settings):
        print(f"script/bench gpu: skipped: {reason}")
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_grad_enabled(False)
    try:
        results = measure(settings, arguments)
    except (BudgetError, torch.OutOfMemoryError) as error:
        print(f"script/bench gpu: skipped: the device is too small: {error}")
        return 0
    publish("gpu", results, arguments.json)
    return 0


def why_not(settings: Settings) -> str | None:
    """Why nothing can be measured here; None if it can."""
    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        return "there is no CUDA device here. --device cpu --checkpoint nano tries the code."
    if settings.checkpoint == "nano":
        return None
    absent = [v for v in VARIANTS if not is_there(v, settings.checkpoint, settings)]
    if absent:
        titles = " and ".join(REPOSITORIES[variant].title for variant in absent)
        return f"{titles} not found ({settings.checkpoint}). script/download fetches the weights."
    return None


def measure(settings: Settings, arguments: argparse.Namespace) -> dict[str, Any]:
    """Every variant in turn; diffusers' transformer of one leaves before that of the next comes."""
    deployment = Deployment.choose(settings)
    sources = sources_of(deployment.checkpoint, settings)
    pipelines = load_pipelines(sources, deployment, Inventory())
    variants: dict[str, Any] = {}
    bench: Bench | None = None
    for name, steps in STEPS.items():
        plain = plain_pipeline(pipelines[name], sources[name], deployment)
        if bench is None:  # ours take what is free beside diffusers' transformer
            transformers = working_transformers(pipelines, sources, deployment, settings)
            compilation = compile_blocks(transformers.modules, deployment, settings)
            engine = Engine(pipelines, transformers, settings.prompt_cache, compilation)
            engine.warm_up(never)
            bench = Bench(engine, transformers, deployment.device)
        case = Case(name, arguments.steps or steps, arguments.size, bench, plain)
        variants[name] = case.measure(arguments.rounds)
        del plain, case
    return {
        "peft": version("peft"),
        "torchao": version("torchao"),
        "cuda": torch.version.cuda,
        "checkpoint": settings.checkpoint,
        "device": str(deployment.device),
        "dtype": str(deployment.dtype).removeprefix("torch."),
        "pixels": [arguments.size, arguments.size],
        "compiled": compilation is not None,
        "rounds": arguments.rounds,
        "adapter_rank": full_depth.RANK,
        "variants": variants,
    }


def plain_pipeline(ours: FluxPipeline, source: Path, deployment: Deployment) -> FluxPipeline:
    """diffusers' own pipeline, with a transformer of its own beside ours."""
    transformer = FluxTransformer2DModel.from_pretrained(
        source / "transformer", torch_dtype=deployment.dtype
    ).to(deployment.device)
    found = FluxPipeline(**ours.components | {"transformer": transformer})
    found.set_progress_bar_config(disable=True)
    return found


@dataclass(frozen=True)
class Bench:
    """Our side of every case."""

    engine: Engine
    transformers: Transformers
    device: torch.device

    def bring(self, variant: str) -> None:
        """Bring a variant to the device in both precisions; BudgetError if they do not fit."""
        keys = {(variant, precision) for precision in PRECISIONS}
        for key in keys:
            self.engine.merge(key, [], never)
        if not keys <= set(self.transformers.resident):
            raise BudgetError(f"it cannot hold {variant} in {' and '.join(PRECISIONS)} at once.")


@dataclass(frozen=True)
class Case:
    """One variant: how it is drawn, by us and by diffusers."""

    variant: str
    steps: int
    side: int
    bench: Bench
    plain: FluxPipeline

    def measure(self, rounds: int) -> dict[str, Any]:
        """Images without and with an adapter, then changes between two adapters."""
        self.bench.bring(self.variant)
        targets, fitted = Targets(self.bench.engine.shapes), self.plain.transformer
        with tempfile.TemporaryDirectory() as directory:
            files = [
                full_depth.write_adapter(Path(directory) / f"{seed}.safetensors", fitted, seed)
                for seed in (1, 2)
            ]
            adapters = [load_adapter(path, path.stem, targets) for path in files]
            without = self.images(rounds, [])
            self.plain.load_lora_weights(files[0], adapter_name="a")
            merged = self.images(rounds, [(adapters[0], 1.0)])
            swaps = self.swaps(files, adapters, targets, rounds)
        return {
            "steps": self.steps,
            "images": {"no adapter": without, "one adapter": merged},
            "swap_ms": swaps,
        }

    def images(self, rounds: int, adapters: Adapters) -> dict[str, Any]:
        """Median seconds of an image, against diffusers, and the memory it takes beside weights."""
        number = itertools.count()

        def prompt() -> str:
            return f"a red circle on a blue background {next(number)}"

        def plain() -> None:
            self.plain(
                prompt(),
                width=self.side,
                height=self.side,
                num_inference_steps=self.steps,
                guidance_scale=GUIDANCE,
                max_sequence_length=VARIANTS[self.variant].max_sequence_length,
                generator=torch.Generator("cpu").manual_seed(0),
            )

        def ours(precision: Precision) -> None:
            self.draw(prompt(), precision, adapters)

        contenders: dict[str, Callable[[], object]] = {
            PLAIN: plain,
            **{f"ours, {p}": partial(ours, p) for p in PRECISIONS},
        }
        runs = {name: Measured(run, self.bench.device) for name, run in contenders.items()}
        seconds = interleave(runs, rounds)
        median = medians(seconds)
        return {
            "median_seconds": {name: round(value, 4) for name, value in median.items()},
            "spread_seconds": {
                name: [round(min(values), 4), round(max(values), 4)]
                for name, values in seconds.items()
            },
            "times_diffusers": {n: round(v / median[PLAIN], 3) for n, v in median.items()},
            "peak_gb_beside_weights": {name: run.gigabytes for name, run in runs.items()},
        }

    def draw(self, prompt: str, precision: Precision, adapters: Adapters) -> None:
        """One image by our engine, as a request asks for it."""
        inputs = Inputs(
            prompt=prompt,
            model=self.variant,
            num_inference_steps=self.steps,
            guidance_scale=GUIDANCE,
            seed=0,
        )
        request = resolve(inputs, Settings())
        request = replace(request, precision=precision, width=self.side, height=self.side)
        list(self.bench.engine.generate(request, adapters, Stopwatch(), never))

    def swaps(
        self, files: list[Path], adapters: list[Adapter], targets: Targets, rounds: int
    ) -> dict[str, float]:
        """Median milliseconds of a change between two adapters that both touch every linear."""
        paths = itertools.cycle(reversed(files))

        def merge(precision: Precision, warm: Iterator[Adapter]) -> None:
            self.bench.engine.merge((self.variant, precision), [(next(warm), 1.0)], never)

        def load_and_merge(precision: Precision, cold: Iterator[Path]) -> None:
            path = next(cold)
            merge(precision, iter([load_adapter(path, f"{path.stem} from disk", targets)]))

        def reload() -> None:
            self.plain.unload_lora_weights()
            self.plain.load_lora_weights(next(paths), adapter_name="a")
            self.plain.set_adapters(["a"], [1.0])

        contenders: dict[str, Callable[[], object]] = {"diffusers, unload + load": reload}
        for precision in PRECISIONS:
            warm, cold = itertools.cycle(adapters), itertools.cycle(files)
            contenders[f"ours, {precision}, warm"] = partial(merge, precision, warm)
            contenders[f"ours, {precision}, cold"] = partial(load_and_merge, precision, cold)
        runs = {name: Measured(run, self.bench.device) for name, run in contenders.items()}
        median = medians(interleave(runs, rounds))
        return {name: round(1000 * value, 1) for name, value in median.items()}


class Measured:
    """A contender that ends when the device has, and knows what memory it took beside weights."""

    def __init__(self, run: Callable[[], object], device: torch.device) -> None:
        self._run, self._device = run, device
        self._peaks: list[int] = []

    def __call__(self) -> None:
        """Run once, and wait for the device."""
        if self._device.type != "cuda":
            self._run()
            return
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        self._run()
        torch.cuda.synchronize(self._device)
        self._peaks.append(torch.cuda.max_memory_allocated(self._device) - before)

    @property
    def gigabytes(self) -> float | None:
        """The median peak above what was allocated before; None where torch does not count."""
        return round(statistics.median(self._peaks) / GB, 2) if self._peaks else None


if __name__ == "__main__":
    sys.exit(main())
