"""An H100 that torch and Triton take for one: fake tensors are on it, and nothing is computed.

For processes of their own: what is patched here stays patched.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import torch
from torch._dynamo import device_interface
from torch._subclasses import fake_tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

CAPABILITY = (9, 0)
MEMORY = 85_000_000_000
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100",
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    gcnArchName="",
    total_memory=MEMORY,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block_optin=232448,
    warp_size=32,
)


class Stream:
    """A stream, or an event: on a card without work nobody waits for one."""

    device = torch.device("cuda", 0)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def wait(self, *_: object) -> None:
        pass

    record = wait_stream = wait_event = synchronize = wait


def pretend() -> None:
    """Give torch and Triton what they ask of CUDA's driver. torch must be built with CUDA."""
    torch._C._ensureCUDADeviceGuardSet()
    fake_tensor.init_gpu_context = lambda _: None  # torch 2.11 makes a tensor there
    number = 10 * CAPABILITY[0] + CAPABILITY[1]
    answers = {
        "is_available": True,
        "is_initialized": True,
        "_lazy_init": None,
        "device_count": 1,
        "current_device": 0,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "get_device_capability": CAPABILITY,
        "get_device_properties": PROPERTIES,
        "mem_get_info": (MEMORY, MEMORY),
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
        "empty_cache": None,
        "synchronize": None,
        "stream": nullcontext(),
        "current_stream": Stream(),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.Stream = torch.cuda.Event = Stream
    torch.Tensor.is_pinned = lambda tensor, *_: tensor.device.type == "cpu"
    torch.Tensor.pin_memory = lambda tensor, *_: tensor
    interface = device_interface.CudaInterface
    for asked in (interface, interface.Worker):
        asked.get_device_properties = staticmethod(lambda *_: PROPERTIES)
    interface.get_compute_capability = staticmethod(lambda *_: number)
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", number, PROPERTIES.warp_size),
            get_current_device=lambda: 0,
        )
    )
