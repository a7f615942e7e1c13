"""How fast FLUX.1 could be at best: operations and bytes of a step against what cards can do.

    operations = sum over linears of 2 x tokens x inputs x outputs
               + sum over blocks of 4 x tokens^2 x width          (attention: QK' and the sum of V)
    bytes      = every weight once
    bound      = steps x max(operations / peak, bytes / bandwidth)

tokens are those that a linear sees: the image's, the text's, both, or one (modulation and
embeddings of time and pooled text). Left out: everything that is no matrix multiplication, and all
traffic of activations; so nothing can be faster, and everything real is slower. Linears in float8
count against the peak of float8, attention and the others always against that of bf16; a card that
cannot multiply in float8 reads float8 weights and multiplies in bf16.

Peaks are dense, with fp32 accumulation, as NVIDIA states them (docs/performance.md has the
sources). With `--json FILE` a plot goes beside it, as FILE with the suffix .png.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.shared import flux1
from benchmarks.shared.report import BLUE, GREY, chart, parser, report
from flux.transformers.float8 import float8_parameters
from flux.transformers.skeleton import size
from flux.variants import VARIANTS

SIDES = (1024, 512)
STEPS = {"dev": 28, "schnell": 4}
PRECISIONS = ("bf16", "fp8")
BOTH, ONCE = "both", "once"


@dataclass(frozen=True)
class Card:
    """Dense peaks in operations per second, bandwidth in bytes per second; fp8 None: has none."""

    name: str
    bf16: float
    fp8: float | None
    bandwidth: float


CARDS = (
    Card("H100 SXM", 989.4e12, 1978.9e12, 3.35e12),
    Card("H200 SXM", 989.4e12, 1978.9e12, 4.8e12),
    Card("A100 80GB SXM", 312e12, None, 2.039e12),
    Card("RTX 4090", 165.2e12, 330.3e12, 1.008e12),
)


@dataclass(frozen=True)
class Work:
    """What one step asks of a card: operations by the precision they run in, and bytes."""

    float8: int
    bf16: int
    bytes: int


def work_of_step(model: FluxTransformer2DModel, image: int, text: int, precision: str) -> Work:
    """Operations and bytes of one step, from the model's own linears.

    image, text: tokens. precision: bf16, or fp8 (the linears that go_fast quantizes).
    """
    float8 = float8_parameters(model) if precision == "fp8" else frozenset()
    tokens = {"image": image, "text": text, BOTH: image + text, ONCE: 1}
    operations = {True: 0, False: 0}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            seen = tokens[stream_of(name)]
            operations[f"{name}.weight" in float8] += 2 * seen * module.weight.numel()
    blocks = len(model.transformer_blocks) + len(model.single_transformer_blocks)
    attention = blocks * 4 * (image + text) ** 2 * model.inner_dim
    return Work(operations[True], operations[False] + attention, size(model, float8))


def stream_of(linear: str) -> str:
    """Which tokens a linear of FLUX.1's transformer sees, by its name."""
    if linear.startswith(("time_text_embed.", "norm_out.")) or ".norm" in linear:
        return ONCE
    if linear.startswith("single_transformer_blocks."):
        return BOTH
    of_text = (".add_", ".to_add_out", ".ff_context.")
    return "text" if linear == "context_embedder" or any(n in linear for n in of_text) else "image"


def bound(work: Work, card: Card) -> tuple[float, float]:
    """Seconds of one step that the operations take, and those that the bytes take."""
    operations = work.float8 / (card.fp8 or card.bf16) + work.bf16 / card.bf16
    return operations, work.bytes / card.bandwidth


def around(side: int, text: int) -> dict[str, dict[str, float]]:
    """Operations and bytes of what surrounds the steps, counted by torch on the meta device."""
    latents = side // flux1.VAE_FACTOR
    pairs = {
        "T5": (flux1.t5(), torch.zeros(1, text, dtype=torch.long, device="meta")),
        "CLIP": (flux1.clip(), torch.zeros(1, 77, dtype=torch.long, device="meta")),
        "VAE decoder": (
            flux1.vae().decoder,
            torch.zeros(1, 16, latents, latents, dtype=torch.bfloat16, device="meta"),
        ),
    }
    found = {}
    for name, (module, given) in pairs.items():
        with FlopCounterMode(display=False) as counter:
            module(given)
        found[name] = {
            "tera_operations": round(counter.get_total_flops() / 1e12, 3),
            "gigabytes": round(size(module, frozenset()) / 1e9, 2),
        }
    return found


def cases() -> list[dict[str, Any]]:
    """Every variant, size and precision, with its bound on every card."""
    found = []
    for variant, steps in STEPS.items():
        model, text = flux1.transformer(variant), VARIANTS[variant].max_sequence_length
        for side in SIDES:
            for precision in PRECISIONS:
                work = work_of_step(model, flux1.image_tokens(side), text, precision)
                bounds = {card.name: bound(work, card) for card in CARDS}
                found.append(
                    {
                        "variant": variant,
                        "pixels": [side, side],
                        "steps": steps,
                        "tokens": [flux1.image_tokens(side), text],
                        "precision": precision,
                        "tera_operations_a_step": {
                            "float8": round(work.float8 / 1e12, 2),
                            "bf16": round(work.bf16 / 1e12, 2),
                        },
                        "gigabytes_a_step": round(work.bytes / 1e9, 2),
                        "step_ms": {
                            name: {
                                "operations": round(1000 * operations, 2),
                                "bytes": round(1000 * bytes_, 2),
                            }
                            for name, (operations, bytes_) in bounds.items()
                        },
                        "bound_seconds": {
                            name: round(steps * max(times), 3) for name, times in bounds.items()
                        },
                    }
                )
    return found


def main() -> None:
    file = parser().parse_args().json
    torch.set_grad_enabled(False)
    found = cases()
    cards = {card.name: [card.bf16, card.fp8, card.bandwidth] for card in CARDS}
    results = {
        "cards": {"columns": ["bf16 op/s", "fp8 op/s", "byte/s"], **cards},
        "cases": found,
        "around_the_steps": {
            f"{variant} {side}": around(side, VARIANTS[variant].max_sequence_length)
            for variant in STEPS
            for side in SIDES
        },
    }
    report("roofline", results, file)
    chart(file, (11, 3.4), lambda figure: plot(figure, found))


def plot(figure: Any, found: list[dict[str, Any]]) -> None:
    """The bounds of each case as bars, a panel for each variant at 1024 x 1024."""
    panels = figure.subplots(1, len(STEPS))
    for axes, (variant, steps) in zip(panels, STEPS.items(), strict=True):
        for shift, precision in ((-0.2, "bf16"), (0.2, "fp8")):
            case = next(
                c
                for c in found
                if (c["variant"], c["pixels"][0], c["precision"]) == (variant, SIDES[0], precision)
            )
            seconds = [case["bound_seconds"][card.name] for card in CARDS]
            bars = axes.barh(
                [place + shift for place in range(len(CARDS))],
                seconds,
                height=0.38,
                label=precision,
                color=GREY if precision == "bf16" else BLUE,
            )
            axes.bar_label(bars, [f"{value:.2f} s" for value in seconds], padding=3)
        axes.set_yticks(range(len(CARDS)), [card.name for card in CARDS])
        axes.invert_yaxis()
        axes.set_title(f"{variant}, {steps} steps, 1024 x 1024: no less than")
        axes.margins(x=0.15)
        axes.legend(frameon=False)


if __name__ == "__main__":
    main()
