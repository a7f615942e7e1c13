"""One denoising step with no adapter, one and two: merged weights beside PEFT's layers."""

import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.shared import full_depth
from benchmarks.shared.report import interleave, medians, parser, report
from flux.transformers.merge import WorkingWeights
from lora.formats.adapter import Targets, load_adapter

ROUNDS = 15
IMAGE_TOKENS, TEXT_TOKENS = 256, 64
BASE = "no adapter"


def main() -> None:
    file = parser().parse_args().json
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as directory:
        base = full_depth.transformer(torch.float32)
        files = [
            full_depth.write_adapter(Path(directory) / f"{seed}.safetensors", base, seed)
            for seed in (1, 2)
        ]
        contenders = {BASE: lambda: base(**inputs())}
        for count, word in ((1, "one"), (2, "two")):
            contenders[f"ours, {word}"] = ours(files[:count])
            contenders[f"PEFT, {word}"] = peft(files[:count])
        seconds = interleave(contenders, ROUNDS, warmup=2)
    median = medians(seconds)
    results = {
        "model": full_depth.describe(base),
        "tokens": [IMAGE_TOKENS, TEXT_TOKENS],
        "dtype": "float32",
        "peft": version("peft"),
        "rounds": ROUNDS,
        "median_ms": {name: round(1000 * value, 1) for name, value in median.items()},
        "times_base": {name: round(value / median[BASE], 3) for name, value in median.items()},
    }
    report("step", results, file)


def ours(files: list[Path]) -> Callable[[], object]:
    model = full_depth.transformer(torch.float32)
    targets = Targets(full_depth.parameter_shapes(model))
    adapters = [load_adapter(path, path.stem, targets) for path in files]
    WorkingWeights({"transformer": model}).reconcile([(adapter, 1.0) for adapter in adapters])
    return lambda: model(**inputs())


def peft(files: list[Path]) -> Callable[[], object]:
    model = full_depth.transformer(torch.float32)
    pipeline = full_depth.pipeline(model)
    names = [f"adapter{path.stem}" for path in files]
    for name, path in zip(names, files, strict=True):
        pipeline.load_lora_weights(path, adapter_name=name)
    pipeline.set_adapters(names, [1.0] * len(names))
    return lambda: model(**inputs())


def inputs() -> dict[str, object]:
    return full_depth.inputs(IMAGE_TOKENS, TEXT_TOKENS)


if __name__ == "__main__":
    main()
