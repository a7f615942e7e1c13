"""Changing an adapter: ours, diffusers, PEFT's hot-swap, and a memcpy of the weights.

With `--json FILE` a bar chart goes beside it, as FILE with the suffix .png.
"""

import itertools
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.shared import full_depth
from benchmarks.shared.report import BLUE, GREY, chart, interleave, medians, parser, report
from flux.transformers.merge import WorkingWeights
from lora.formats.adapter import Targets, load_adapter

ROUNDS = 15
HEADS = (3, 6)
FLOOR = "memcpy of the weights"
SHOWN = (FLOOR, "ours", "PEFT", "diffusers")
READ = "file: read and cast"
COLD = "file: ours, checked and parsed"

Contenders = dict[str, Callable[[], object]]


def main() -> None:
    file = parser().parse_args().json
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    widths = [at_width(heads) for heads in HEADS]
    report("swap", {"peft": version("peft"), "rounds": ROUNDS, "widths": widths}, file)
    chart(file, (12, 4), lambda figure: plot(figure, widths))


def at_width(heads: int) -> dict[str, Any]:
    """All contenders on a transformer that is 64 wide per head."""
    with tempfile.TemporaryDirectory() as directory:
        model = full_depth.transformer(torch.bfloat16, heads)
        files = [
            full_depth.write_adapter(Path(directory) / f"{seed}.safetensors", model, seed)
            for seed in (1, 2)
        ]
        contenders = ours(files, heads) | others(files, heads) | reading(files, heads)
        seconds = interleave(contenders | bare(files[0], heads), ROUNDS, warmup=2)
    median = medians(seconds)
    return {
        "model": full_depth.describe(model),
        "median_ms": {name: round(1000 * value, 1) for name, value in median.items()},
        "times_memcpy": {name: round(v / median[FLOOR], 2) for name, v in median.items()},
        "file_times_reading": round(median[COLD] / median[READ], 2),
    }


def ours(files: list[Path], heads: int) -> Contenders:
    """Swaps between two adapters; and on weights of their own, a merge and its restoring."""
    swapping, merging = (full_depth.transformer(torch.bfloat16, heads) for _ in range(2))
    targets = Targets(full_depth.parameter_shapes(swapping))
    adapters = [load_adapter(path, path.stem, targets) for path in files]
    swapped = WorkingWeights({"transformer": swapping})
    merged = WorkingWeights({"transformer": merging})
    source = [linear.weight.clone() for linear in full_depth.linears(swapping).values()]
    target = [torch.empty_like(weight) for weight in source]
    cached, cold = itertools.cycle(adapters), itertools.cycle(files)

    def from_disk() -> None:
        path = next(cold)
        swapped.reconcile([(load_adapter(path, f"{path.stem} from disk", targets), 1.0)])

    def memcpy() -> None:
        for to, weight in zip(target, source, strict=True):
            to.copy_(weight)

    return {
        FLOOR: memcpy,
        "ours, in memory": lambda: swapped.reconcile([(next(cached), 1.0)]),
        "ours, from disk": from_disk,
        "ours, two adapters": lambda: merged.reconcile([(a, 0.7) for a in adapters]),
        "ours, restore": lambda: merged.reconcile([]),
    }


def others(files: list[Path], heads: int) -> Contenders:
    """diffusers' and PEFT's ways, from tensors in memory and from the file."""
    loaded = full_depth.pipeline(full_depth.transformer(torch.bfloat16, heads))
    hot = full_depth.pipeline(full_depth.transformer(torch.bfloat16, heads))
    hot.enable_lora_hotswap(target_rank=full_depth.RANK)
    hot.load_lora_weights(files[0], adapter_name="a")
    states = itertools.cycle([load_file(path) for path in files])
    paths = itertools.cycle(files)

    def reload(source: dict[str, torch.Tensor] | Path) -> None:
        loaded.unload_lora_weights()
        loaded.load_lora_weights(source, adapter_name="a")
        loaded.set_adapters(["a"], [1.0])

    def hotswap(source: dict[str, torch.Tensor] | Path) -> None:
        hot.load_lora_weights(source, adapter_name="a", hotswap=True)

    return {
        "PEFT hot-swap, in memory": lambda: hotswap(dict(next(states))),
        "PEFT hot-swap, from disk": lambda: hotswap(next(paths)),
        "diffusers unload + load, in memory": lambda: reload(dict(next(states))),
        "diffusers unload + load, from disk": lambda: reload(next(paths)),
    }


def reading(files: list[Path], heads: int) -> Contenders:
    """What a cold load costs by itself (the file is in the page cache for both)."""
    targets = Targets(full_depth.parameter_shapes(full_depth.transformer(torch.bfloat16, heads)))
    return {
        READ: lambda: {name: tensor.float() for name, tensor in load_file(files[0]).items()},
        COLD: lambda: load_adapter(files[0], "digest", targets),
    }


def bare(path: Path, heads: int) -> Contenders:
    """The operations of a swap without what surrounds them, and a bf16 `addmm` in one pass."""
    model = full_depth.transformer(torch.bfloat16, heads)
    tensors = load_file(path)
    rows = [
        (
            linear.weight,
            linear.weight.clone(),
            tensors[f"transformer.{name}.lora_B.weight"],
            tensors[f"transformer.{name}.lora_A.weight"],
        )
        for name, linear in full_depth.linears(model).items()
    ]
    scratch = torch.empty(max(weight.numel() for weight, *_ in rows))

    def three_operations() -> None:
        for working, base, up, down in rows:
            exact = scratch[: working.numel()].view(working.shape)
            exact.copy_(base).addmm_(up.float(), down.float())
            working.copy_(exact)

    def one_pass() -> None:
        for working, base, up, down in rows:
            torch.addmm(base, up, down, out=working)

    return {"bare: widen, addmm, round": three_operations, "bare: bf16 addmm": one_pass}


def plot(figure: Any, widths: list[dict[str, Any]]) -> None:
    """A panel for each width."""
    panels = figure.subplots(1, len(widths))
    for axes, result in zip(panels, widths, strict=True):
        rows = {n: ms for n, ms in result["median_ms"].items() if n.startswith(SHOWN)}
        names = sorted(rows, key=rows.__getitem__, reverse=True)
        colours = [BLUE if name.startswith("ours") else GREY for name in names]
        bars = axes.barh(names, [rows[name] for name in names], color=colours)
        axes.bar_label(bars, [f"{rows[name]:.0f} ms" for name in names], padding=3)
        axes.set_title(f"width {result['model']['width']}: ms for one change of adapter")
        axes.margins(x=0.15)


if __name__ == "__main__":
    main()
