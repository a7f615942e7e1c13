"""What the host does for each weight in a change of adapter, without a card.

All 504 linears of FLUX.1, so narrow that torch's operators have nothing to compute. For the kernel,
Triton compiles it for a Hopper card and prepares every launch, and an idle driver drops it: what
CUDA's own call takes is missing. Other programs only ever lengthen a round, so the shortest one
stands beside the median.
"""

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from benchmarks.shared import full_depth
from benchmarks.shared.report import interleave, medians, parser, report
from flux.transformers.lora_kernel import write
from flux.transformers.merge import WorkingWeights
from flux.transformers.one_pass import OnePass
from lora.formats.adapter import Targets, load_adapter

ROUNDS = 60
ROOM = 1 << 40


class Binaries:
    """What the idle driver makes of a compiled kernel."""

    @staticmethod
    def load_binary(*_: Any) -> tuple[Any, ...]:
        """Module, function, registers, spills and threads of a block."""
        return None, None, 32, 0, 1024

    @staticmethod
    def get_device_properties(_: int) -> dict[str, int]:
        """Shared memory of a block, in bytes."""
        return {"max_shared_mem": 232448}


class IdleDriver:
    """A driver as Triton takes it, for a Hopper card; kernels are launched, and none runs."""

    utils = Binaries

    @staticmethod
    def launcher_cls(*_: Any) -> Callable[..., None]:
        """What launches a kernel."""
        return lambda *_, **__: None

    @staticmethod
    def get_current_device() -> int:
        """The only one."""
        return 0

    @staticmethod
    def get_current_stream(_: int) -> int:
        """The default one."""
        return 0

    @staticmethod
    def get_current_target() -> GPUTarget:
        """What kernels are compiled for."""
        return GPUTarget("cuda", 90, 32)


def main() -> None:
    file = parser().parse_args().json
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(IdleDriver())
    model = full_depth.transformer(torch.bfloat16, 1)
    targets = Targets(full_depth.parameter_shapes(model))
    with tempfile.TemporaryDirectory() as directory:
        files = [
            full_depth.write_adapter(Path(directory) / f"{seed}.safetensors", model, seed)
            for seed in (1, 2)
        ]
        adapters = [load_adapter(path, path.stem, targets) for path in files]
    base = {name: p.detach().clone() for name, p in model.named_parameters()}

    def swapping(one_pass: OnePass | None) -> Callable[[], object]:
        weights = WorkingWeights(
            {"transformer": model},
            lambda _, name: base[name],
            one_pass=one_pass,
        )
        turns = itertools.cycle(adapters)
        return lambda: weights.reconcile([(next(turns), 1.0)])

    contenders = {
        "torch's operators": swapping(None),
        "one pass": swapping(OnePass(write, ROOM, torch.Tensor.clone)),
        "one pass, without its launches": swapping(
            OnePass(lambda *_: True, ROOM, torch.Tensor.clone)
        ),
    }
    seconds = interleave(contenders, ROUNDS, warmup=3)
    count = len(full_depth.linears(model))
    shortest = {name: min(runs) for name, runs in seconds.items()}
    figures = {
        label: {name: round(1e6 * value / count, 1) for name, value in found.items()}
        for label, found in (("shortest_us", shortest), ("median_us", medians(seconds)))
    }
    report("swap_host", {"weights": count, "rounds": ROUNDS, **figures}, file)


if __name__ == "__main__":
    main()
