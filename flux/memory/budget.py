"""The memory budgets for weights: from the settings, or from what the machine has."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from flux.memory.device import empty_cache
from weights.serving.inventory import size_of
from weights.serving.settings import GB

DEVICE_RESERVE = 6_500_000_000  # activations, scratch of a merge, and the allocator's rounding
HOST_RESERVE = 17 * GB  # parsed adapters, Python, libraries, images
CGROUP_LIMITS = (  # of a container, by version; the second has "max" where there is no limit
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
    Path("/sys/fs/cgroup/memory.max"),
)


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
    return max(0, int(free) - DEVICE_RESERVE)


def host_budget(setting: int | None, limit_files: Sequence[Path] = CGROUP_LIMITS) -> int:
    """Bytes of host memory that base weights may take, beside the memory map."""
    if setting is not None:
        return setting
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [file.read_text().strip() for file in limit_files if file.is_file()]
    least = min([total, *(int(limit) for limit in limits if limit.isdecimal())])
    return max(0, least - HOST_RESERVE)


def bytes_of(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return size_of([*module.parameters(), *module.buffers()])
