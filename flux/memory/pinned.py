"""Host memory in a few large chunks, page-locked for CUDA.

A separate page-locked allocation for every weight would take half as much again, because the
allocator rounds each one up to a power of two.

By default torch page-locks with cudaHostAlloc, which maps all pages of a chunk in one thread, under
a lock of the driver. With `pinned_use_cuda_host_register` and `pinned_num_register_threads`
(torch's notes on CUDA, under PYTORCH_ALLOC_CONF) it maps them in several threads, and CUDA locks
what is mapped. torch reads these settings at every allocation, so they are set before the first
page-locked chunk.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flux.memory.budget import bytes_of
from flux.memory.residency import BudgetError
from weights.serving.settings import GB

logger = logging.getLogger(__name__)

CHUNK = 1 << 28  # a power of two, as the allocator of page-locked memory rounds up to one
ALIGNMENT = 256
REGISTER_THREADS = 8  # that map pages; more gain nothing (torch's CUDAAllocatorConfig.h)
REGISTER, THREADS = "pinned_use_cuda_host_register", "pinned_num_register_threads"
TRIAL = 4 << 20  # bytes
OPERATORS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # the first one that is set counts


class Arena:
    """Allocates tensors in chunks, each where it fits first; a chunk is freed with its last tensor.

    FLUX.1's weights leave 2 to 5 % of their chunks unused.

    Args:
        pinned: whether a device may copy from it beside its other work.
    """

    def __init__(self, *, pinned: bool) -> None:
        if pinned and torch.cuda.is_available():
            _register_in_parallel()
        self._pinned = pinned
        self._free: list[Tensor] = []  # what is left of each chunk

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor.

        Raises:
            BudgetError: there is no memory for it.
        """
        count = torch.Size(shape).numel() * dtype.itemsize
        taken = -(-count // ALIGNMENT) * ALIGNMENT
        fits = (index for index, left in enumerate(self._free) if left.numel() >= taken)
        index = next(fits, len(self._free))
        if index == len(self._free):
            self._free.append(self._another(max(CHUNK, taken)))
        left = self._free[index]
        self._free[index] = left[taken:]
        return left[:count].view(dtype).view(shape)

    def _another(self, size: int) -> Tensor:
        kind = "page-locked host memory" if self._pinned else "host memory"
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        except RuntimeError as error:
            raise BudgetError(
                f"There are no {size / GB:.2f} GB more of {kind} ({error}): give the machine "
                "more, or set FLUX_HOST_MEMORY_GB to what it has for weights"
            ) from error


def move_parameters(module: nn.Module, *, pinned: bool) -> bool:
    """Move a module's parameters from the memory map to an arena.

    Returns:
        whether there was memory for it; if not, the parameters are unchanged.
    """
    try:
        copies = _copies(module, pinned)
    except BudgetError as error:
        logger.warning("Weights stay in the memory map: %s", str(error))  # no traceback kept
    else:
        for parameter, copy in zip(module.parameters(), copies, strict=True):
            parameter.data = copy
        return True
    empty_host_cache()  # the chunks that there was memory for; the error held them
    return False


class PinnedBudget:
    """Page-locked host memory for modules, under a budget: first come, first served. Thread-safe.

    Args:
        budget: in bytes.
    """

    def __init__(self, budget: int) -> None:
        self._left = budget
        self._one_at_a_time = threading.Lock()

    def pin(self, module: nn.Module) -> bool:
        """`move_parameters` of a module into it, if it still has room for it."""
        size = bytes_of(module)
        with self._one_at_a_time:
            if size > self._left or not move_parameters(module, pinned=True):
                return False
            self._left -= size
            return True


def empty_host_cache() -> None:
    """Give the unused page-locked memory that torch has cached back to the system."""
    if not torch.cuda.is_available():
        return
    # torch 2.11 lacks the public name; its own CUDA graphs call the other
    empty = getattr(torch.accelerator, "empty_host_cache", None) or torch._C._host_emptyCache
    empty()


def _register_in_parallel() -> None:
    """Have torch page-lock with several threads, unless the operator has said how.

    Settings that are not repeated fall back to torch's defaults, so the operator's are repeated.
    Some sandboxes lock what CUDA allocates and refuse what is allocated already, so it is tried.
    """
    set_by_operator = next(filter(None, map(os.environ.get, OPERATORS)), "")
    if REGISTER in set_by_operator or THREADS in set_by_operator:
        return
    threads = min(REGISTER_THREADS, 1 << ((os.cpu_count() or 1).bit_length() - 1))
    how = f"{REGISTER}:True,{THREADS}:{threads}"  # their number has to be a power of two
    try:
        _tell_allocator(set_by_operator, how)
        torch.empty(TRIAL, dtype=torch.uint8, pin_memory=True)
    except (AttributeError, RuntimeError, ValueError) as error:
        logger.warning("Page-locking with one thread, as %s fails: %s", how, error)
        with contextlib.suppress(AttributeError, RuntimeError, ValueError):
            _tell_allocator(set_by_operator, f"{REGISTER}:False")


def _tell_allocator(*settings: str) -> None:
    torch._C._accelerator_setAllocatorSettings(",".join(filter(None, settings)))


def _copies(module: nn.Module, pinned: bool) -> list[Tensor]:
    arena = Arena(pinned=pinned)
    values = [parameter.detach() for parameter in module.parameters()]
    return [arena.empty(value.shape, value.dtype).copy_(value) for value in values]
