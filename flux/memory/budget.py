"""The memory budgets for weights: from the settings, or from what the machine has."""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from flux.memory.residency import BudgetError
from weights.serving.inventory import size_of
from weights.serving.settings import GB

logger = logging.getLogger(__name__)

T = TypeVar("T")

DEVICE_RESERVE = 6_500_000_000  # activations, scratch of a merge, and the allocator's rounding
HOST_RESERVE = 17 * GB  # parsed adapters, Python, libraries, images
CGROUP_LIMITS = (  # of a container, by version; the second has "max" where there is no limit
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
    Path("/sys/fs/cgroup/memory.max"),
)
OUT_OF_MEMORY = (  # of the driver, cuBLAS and cuDNN; the last is cuDNN's where no workspace fits
    "out of memory",
    "ALLOC_FAILED",
    "ALLOCATION_FAILED",
    "unable to find an engine to execute this computation",
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


def answers(device: torch.device) -> bool:
    """Whether a device can still be used.

    A CUDA context in which a kernel has failed answers every later call with an error, until the
    process ends. The call does not wait for kernels that run.
    """
    if device.type != "cuda":
        return True
    try:
        torch.cuda.mem_get_info(device)
    except RuntimeError as error:
        logger.error("%s cannot be used any more: %s", device, error)
        return False
    return True


def empty_cache(device: torch.device) -> None:
    """Give the unused memory that torch has cached on a device back to the driver."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def bytes_of(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return size_of([*module.parameters(), *module.buffers()])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device lacked memory.

    This includes failed allocations of the driver, cuBLAS and cuDNN, which have no exception class
    of their own, and all of these inside a compiler's exception.
    """
    inner = getattr(error, "inner_exception", None)
    if isinstance(inner, BaseException):
        return is_out_of_memory(inner)
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if isinstance(error, BudgetError) or not isinstance(error, RuntimeError):
        return False  # a budget's message may quote a lack of page-locked memory
    return any(message in str(error) for message in OUT_OF_MEMORY)


def with_fallback(
    work: Callable[[], T], fallback: Callable[[], T], recoverable: Callable[[Exception], bool]
) -> T:
    """Do some work; if it fails in a way that can be recovered from, do other work instead.

    An exception keeps the frames that it passed through, and with them tensors on the device, until
    its except block ends. So the other work starts after that.

    Args:
        recoverable: called with the exception; it is raised again if the answer is no.
    """
    try:
        return work()
    except Exception as error:
        if not recoverable(error):
            raise
    return fallback()
