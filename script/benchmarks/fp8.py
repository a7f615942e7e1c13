"""go_fast's weights: bytes, error of the output, and what is left of an adapter's delta.

Beside ours: torchao's own `quantize_` on a freshly merged bf16 model, and the recipe of the
package that this one replaces: one scale for the whole tensor, an adapter added to float8 weights
that are widened and quantized again, activations in e5m2. The last two are written down here
from their description. With `--json FILE` a plot of the gains goes beside it, as FILE with the
suffix .png.
"""

import statistics
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization import Float8WeightOnlyConfig, quantize_

from benchmarks.shared import flux1, full_depth
from benchmarks.shared.report import BLUE, GREY, chart, parser, report
from benchmarks.step import inputs
from flux.request import GO_FAST_MULTIPLIER
from flux.transformers.float8 import empty_float8, float8_parameters, quantize_into
from flux.transformers.skeleton import size

WIDTH, RANK, SEEDS = 1536, 16, 5
DELTAS = (0.5, 1.0, 2.0, 5.0)  # standard deviation, in per cent of the weights'
CPU = torch.device("cpu")
Merge = Callable[[Tensor, Tensor], Tensor]
"""(bf16 weight, fp32 delta) -> the values that serve after the merge."""


def main() -> None:
    file = parser().parse_args().json
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    gains = {f"{percent:g} %": gain(percent / 100) for percent in DELTAS}
    results = {
        "torchao": version("torchao"),
        "matrix": [WIDTH, WIDTH],
        "rank": RANK,
        "seeds": SEEDS,
        "gigabytes_of_FLUX.1-dev": gigabytes(),
        "gain": gains,
        "model": full_depth.describe(full_depth.transformer(torch.float32)),
        "output_error": output_errors(),
    }
    report("fp8", results, file)
    chart(file, (7, 4), lambda figure: plot(figure, gains))


def ours(weight: Tensor, *, dynamic: bool = False) -> Tensor:
    found = empty_float8(weight.shape, torch.float32, CPU, dynamic=dynamic)
    quantize_into(found, weight)
    return found


def torchao(weight: Tensor) -> Tensor:
    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    quantize_(layer, Float8WeightOnlyConfig())
    return layer.weight.data


def per_tensor(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to a float8 dtype with one scale for all, as fp32."""
    scale = values.abs().max().float() / torch.finfo(dtype).max
    return (values.float() / scale).to(dtype).float() * scale


def predecessor(weight: Tensor, delta: Tensor) -> Tensor:
    """Add a delta to a weight that is float8 already, and quantize the sum."""
    if not delta.any():
        return per_tensor(weight, torch.float8_e4m3fn)
    return per_tensor(per_tensor(weight, torch.float8_e4m3fn) + delta, torch.float8_e4m3fn)


MERGES: dict[str, Merge] = {
    "bf16": lambda weight, delta: (weight.float() + delta).bfloat16().float(),
    "ours": lambda weight, delta: ours(weight.float() + delta).dequantize(),
    "torchao, freshly merged": lambda weight, delta: (
        torchao((weight.float() + delta).bfloat16()).dequantize().float()
    ),
    "predecessor": predecessor,
    "predecessor x 1.5": lambda weight, delta: predecessor(weight, GO_FAST_MULTIPLIER * delta),
}


def gain(strength: float) -> dict[str, dict[str, float]]:
    """The share of a delta that arrives: <merged - base, delta> / <delta, delta>; 1 is right.

    For inputs that are white this is the same ratio of the outputs.
    """
    found: dict[str, list[float]] = {name: [] for name in MERGES}
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(WIDTH, WIDTH, generator=generator).div(WIDTH**0.5).bfloat16()
        up = torch.randn(WIDTH, RANK, generator=generator)
        delta = up @ torch.randn(RANK, WIDTH, generator=generator)
        delta *= strength * weight.float().std() / delta.std()
        for name, merge in MERGES.items():
            arrived = merge(weight, delta) - merge(weight, torch.zeros_like(delta))
            found[name].append(((arrived * delta).sum() / delta.square().sum()).item())
    return {
        name: {
            "mean": round(statistics.mean(values), 3),
            "least": round(min(values), 3),
            "largest": round(max(values), 3),
        }
        for name, values in found.items()
    }


def gigabytes() -> dict[str, float]:
    """Of FLUX.1-dev's real configuration, without its memory."""
    model = flux1.transformer("dev")
    every = frozenset(f"{name}.weight" for name in full_depth.linears(model))
    chosen = {"bf16": frozenset(), "ours": float8_parameters(model), "all linears": every}
    return {name: round(size(model, names) / 1e9, 2) for name, names in chosen.items()}


class Float8PerTensor(nn.Module):
    """A linear with one scale for its weight (e4m3) and one for its input (e5m2)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = per_tensor(linear.weight, torch.float8_e4m3fn)
        self.bias = linear.bias

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., columns] to [..., rows]."""
        hidden = per_tensor(hidden, torch.float8_e5m2)
        return nn.functional.linear(hidden, self.weight, self.bias)


def output_errors() -> dict[str, float]:
    """|output - exact| / |exact| of a step of the model with random weights, in fp32."""
    exact = full_depth.transformer(torch.float32)(**inputs())[0]

    def error(change: Callable[[nn.Module], None]) -> float:
        model = full_depth.transformer(torch.float32)
        change(model)
        output = model(**inputs())[0]
        return round(((output - exact).norm() / exact.norm()).item(), 5)

    return {
        "bf16 weights": error(lambda model: round_to_bf16(model)),
        "ours, weights only": error(lambda model: quantize_blocks(model, dynamic=False)),
        "ours, activations too": error(lambda model: quantize_blocks(model, dynamic=True)),
        "all linears, activations too": error(lambda model: quantize_all(model, dynamic=True)),
        "torchao's own, weights only": error(quantize_blocks_by_torchao),
        "predecessor": error(quantize_blocks_per_tensor),
    }


def round_to_bf16(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()


def quantize_blocks(model: nn.Module, *, dynamic: bool) -> None:
    for name in float8_parameters(model):
        weight = ours(model.get_parameter(name), dynamic=dynamic)
        module = model.get_submodule(name.removesuffix(".weight"))
        module.weight = nn.Parameter(weight, requires_grad=False)


def quantize_all(model: nn.Module, *, dynamic: bool) -> None:
    for module in full_depth.linears(model).values():
        module.weight = nn.Parameter(ours(module.weight, dynamic=dynamic), requires_grad=False)


def quantize_blocks_by_torchao(model: nn.Module) -> None:
    names = float8_parameters(model)
    quantize_(model, Float8WeightOnlyConfig(), lambda _, name: f"{name}.weight" in names)


def quantize_blocks_per_tensor(model: nn.Module) -> None:
    for name in float8_parameters(model):
        owner, _, leaf = name.removesuffix(".weight").rpartition(".")
        parent = model.get_submodule(owner)
        setattr(parent, leaf, Float8PerTensor(getattr(parent, leaf)))


def plot(figure: Any, gains: dict[str, dict[str, dict[str, float]]]) -> None:
    """What arrives of a delta, by its size, a line for each way of merging."""
    axes = figure.subplots()
    axes.axhline(1, color=GREY, linewidth=1)
    for name in MERGES:
        values = [gains[f"{percent:g} %"][name]["mean"] for percent in DELTAS]
        style = {"linewidth": 3, "color": BLUE} if name == "ours" else {"linestyle": "--"}
        axes.plot(DELTAS, values, marker="o", label=name, **style)
    axes.set_xscale("log")
    axes.set_xticks(DELTAS, [f"{percent:g} %" for percent in DELTAS])
    axes.minorticks_off()
    axes.set_xlabel("standard deviation of the adapter's delta, of the weights'")
    axes.set_ylabel("share of the delta that arrives")
    axes.set_ylim(0, 1.6)
    axes.legend(frameon=False)


if __name__ == "__main__":
    main()
