"""What is where on which card: the tables of docs/memory.md, from FLUX.1's own configurations.

Nothing is measured or loaded. Sizes are those of the official checkpoints on the meta device, and
what fits is decided by the code that serves (flux/memory/residency.py). A card is taken to have
what torch reports of the least of its size, less what CUDA and the safety checkers take; a host has
its nominal size in GiB.
"""

from collections.abc import Iterable, Mapping

from torch import nn

from benchmarks.shared import flux1
from benchmarks.shared.report import parser, report
from flux.memory.budget import DEVICE_RESERVE, HOST_RESERVE, bytes_of
from flux.memory.offload import COMPONENTS
from flux.memory.residency import BASE, ORDER, BaseCopy, BudgetError, Item, Residency
from flux.transformers.float8 import float8_parameters
from flux.transformers.skeleton import size
from flux.variants import VARIANTS, Key
from weights.serving.settings import GB, Settings

CARDS = {  # nominal size, and what an out-of-memory message of torch calls the total, in GiB
    16: 15.7,
    24: 22.03,  # A10G, L4
    32: 31.36,  # RTX 5090
    40: 39.38,  # A100
    48: 44.39,  # L40S
    80: 79.11,  # H100
    96: 94.5,  # GH200
    141: 139.8,  # H200
}
HOSTS = (48, 64, 96, 128)
CHECKERS = int(0.8 * GB)
ADAPTERS = Settings().lora_device_bytes
CUDA_CONTEXT = GB // 2  # an estimate
GIB = 1 << 30


def transformers() -> dict[Item, int]:
    """Bytes of each transformer."""
    found = {variant: flux1.transformer(variant) for variant in VARIANTS}
    return {
        key: size(module, float8_parameters(module) if key.precision == "fp8" else frozenset())
        for key in ORDER
        for module in [found[key.variant]]
    }


def components() -> dict[str, nn.Module]:
    """What dev and schnell share."""
    return {
        "vae": flux1.vae(),
        "text_encoder": flux1.clip(),
        "text_encoder_2": flux1.t5(),
    }


def largest_layer(modules: Iterable[nn.Module]) -> int:
    """Bytes of the largest layer; offloading has two of them on the device at a time."""
    leaves = (leaf for module in modules for leaf in module.modules() if not any(leaf.children()))
    return max(map(bytes_of, leaves))


def at_start(sizes: Mapping[Item, int], budget: int) -> str:
    """What is brought to a device or host with room for `budget` bytes, most wanted first."""
    try:
        found = Residency(sizes, budget).at_start()[::-1]
    except BudgetError:
        return "none: setup fails"
    names = [" ".join(item) for item in found]
    if set(ORDER) <= set(found):
        names = ["all four", *(name for name in names if name.endswith(BASE))]
    return ", ".join(names)


def cards(sizes: Mapping[Item, int], shared: Mapping[str, nn.Module]) -> list[str]:
    """A line for each card: what is on it at the start without offloading, and without T5."""
    lines = ["| card | `FLUX_OFFLOAD=none` | `t5` |", "|---|---|---|"]
    items: dict[Item, int] = {
        **sizes,
        **{BaseCopy(variant): sizes[Key(variant, "bf16")] for variant in VARIANTS},
    }
    for gigabytes, gibibytes in CARDS.items():
        free = int(gibibytes * GIB) - CUDA_CONTEXT - CHECKERS - DEVICE_RESERVE - ADAPTERS
        found = []
        for setting in ("none", "t5"):
            there = [part for name, part in shared.items() if name not in COMPONENTS[setting]]
            found.append(at_start(items, free - sum(map(bytes_of, there))))
        lines.append(f"| {gigabytes} GB | {' | '.join(found)} |")
    return lines


def hosts(sizes: Mapping[Item, int], shared: Mapping[str, nn.Module]) -> list[str]:
    """A line for each size of host memory: what is ready there with `FLUX_OFFLOAD=all`."""
    t5 = bytes_of(shared["text_encoder_2"])
    lines = ["| host memory | `FLUX_OFFLOAD=all` |", "|---|---|"]
    for gibibytes in HOSTS:
        left = gibibytes * GIB - HOST_RESERVE - t5
        lines.append(f"| {gibibytes} GB | {at_start(sizes, left)} |")
    return lines


def main() -> None:
    """Print the tables."""
    file = parser().parse_args().json
    sizes, shared = transformers(), components()
    for line in (*cards(sizes, shared), "", *hosts(sizes, shared), ""):
        print(line)
    visitors = [flux1.transformer("dev"), shared["text_encoder_2"]]
    bytes_by_part = {" ".join(key): count for key, count in sizes.items()}
    bytes_by_part |= {name: bytes_of(module) for name, module in shared.items()}
    report("memory", {"bytes": bytes_by_part, "largest_layer": largest_layer(visitors)}, file)


if __name__ == "__main__":
    main()
