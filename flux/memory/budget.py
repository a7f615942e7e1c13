"""The memory budgets for weights: from the settings, or from what the machine has."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePath

import torch
from torch import nn

from flux.memory.device import empty_cache
from weights.serving.inventory import size_of
from weights.serving.settings import GB

DEVICE_RESERVE = 6_500_000_000  # activations, scratch of a merge, and the allocator's rounding
HOST_RESERVE = 17 * GB  # parsed adapters, Python, libraries, images
CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def device_budget(setting: int | None, device: torch.device, loaded: int) -> int | None:
    """Bytes of the device that more weights may take; None where that is not limited.

    Without a setting, a CPU has no limit: its weights share memory with the files' mapping, and
    the system pages.

    Args:
        setting: what all weights may take together.
        device: where they are.
        loaded: bytes of those that are there already, and stay.
    """
    if setting is not None:
        return setting - loaded
    if device.type != "cuda":
        return None
    empty_cache(device)  # which would count as taken
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) - DEVICE_RESERVE


def host_budget(
    setting: int | None, cgroups: Path = CGROUPS, own_cgroups: Path = OWN_CGROUPS
) -> int:
    """Bytes of host memory that base weights may take, beside the memory map.

    Args:
        setting: what they may take; None: what the machine, or a control group that this process is
            in, has for all.
        cgroups: where the control groups are mounted.
        own_cgroups: names those of this process.
    """
    if setting is not None:
        return setting
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    files = filter(Path.is_file, _limits(cgroups, own_cgroups))
    limits = [file.read_text().strip() for file in files]  # "max" where there is none
    least = min([total, *(int(limit) for limit in limits if limit.isdecimal())])
    return max(0, least - HOST_RESERVE)


def _limits(cgroups: Path, own_cgroups: Path) -> Iterator[Path]:
    """Files with a limit that counts here: of the process's groups, and of all above them.

    A container sees its own group as the root, in whatever way it is named (cgroups(7)).
    """
    yield from (cgroups / "memory.max", cgroups / "memory/memory.limit_in_bytes")
    lines = own_cgroups.read_text().splitlines() if own_cgroups.is_file() else []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        place = PurePath(group.strip("/"))
        for each in (place, *place.parents):
            if not controllers:
                yield cgroups / each / "memory.max"
            elif "memory" in controllers.split(","):
                yield cgroups / "memory" / each / "memory.limit_in_bytes"


def bytes_of(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return size_of([*module.parameters(), *module.buffers()])
