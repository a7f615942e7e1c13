"""A device in use: whether it answers, whether it lacked memory, and giving memory back."""

import logging

import torch

from flux.memory.residency import BudgetError

logger = logging.getLogger(__name__)

OUT_OF_MEMORY = (  # of the driver, cuBLAS and cuDNN; the last is cuDNN's where no workspace fits
    "out of memory",
    "ALLOC_FAILED",
    "ALLOCATION_FAILED",
    "unable to find an engine to execute this computation",
)


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
