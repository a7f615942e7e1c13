"""Pristine values on their way to the device, beside what the device computes.

On CUDA the copies have a stream of their own: while one weight is merged, the next one crosses the
bus into the other of two buffers, so a whole transformer needs no more of the device than two
weights. The host does not wait for them: it puts the order of both streams down, one weight after
the other. The only point where order matters is `CopyStream.meet`, and whoever uses `bring` calls
`wait` at its end, whatever happened, so that nothing computed later, or allocated in memory given
back meanwhile, can come before a copy.

Refused: copying while the prompt is encoded. By arithmetic, T5 (5 TFLOP for 512 tokens) would hide
a few hundredths of the 23.8 GB that cross the bus, and records would be open for half a request.
"""

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor


class CopyStream(Protocol):
    """An order of copies beside the order of what the current stream computes."""

    def carries(self, source: Tensor) -> bool:
        """Whether a tensor is elsewhere, and has to be brought to the device."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Put a copy down; it is made at any time between the meetings before and after."""
        ...

    def meet(self) -> None:
        """Put down that what either stream is given from now on comes after all before, of both."""
        ...


class CudaCopyStream:
    """Copies from host memory on a CUDA stream; asynchronous where that memory is page-locked."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def carries(self, source: Tensor) -> bool:
        """See `CopyStream.carries`."""
        return source.device.type == "cpu"

    def copy(self, target: Tensor, source: Tensor) -> None:
        """See `CopyStream.copy`."""
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def meet(self) -> None:
        """See `CopyStream.meet`; the host does not wait."""
        current = torch.cuda.current_stream(self._stream.device)
        current.wait_stream(self._stream)
        self._stream.wait_stream(current)


def copy_stream(device: torch.device) -> CopyStream | None:
    """A copy stream for a device; None where it has none, as on a CPU."""
    return CudaCopyStream(device) if device.type == "cuda" else None


class Staging:
    """Brings tensors to the device, each while the one before is used.

    Args:
        device: where they are wanted.
        stream: that copies them; None: they are handed on as they are.
    """

    def __init__(self, device: torch.device, stream: CopyStream | None) -> None:
        self._device = device
        self._stream = stream
        self._buffers = [torch.empty(0, dtype=torch.uint8, device=device)] * 2

    def bring(self, sources: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield each source as it is on the device, valid until the next one is asked for."""
        if self._stream is None:
            yield from sources
            return
        near: Tensor | None = None
        for source in sources:
            # After the copy of `near`, and after all use of the tensor before it, whose buffer
            # this source takes; beside the use of `near`, which is put down after the yield.
            self._stream.meet()
            coming = self._send(self._stream, source)
            if near is not None:
                yield near
            near = coming
        self._stream.meet()
        if near is not None:
            yield near

    def wait(self) -> None:
        """Put down that whatever comes now comes after all copies; the host does not wait."""
        if self._stream is not None:
            self._stream.meet()

    def _send(self, stream: CopyStream, source: Tensor) -> Tensor:
        if not stream.carries(source):
            return source
        count = source.numel() * source.element_size()
        self._buffers.reverse()
        if self._buffers[0].numel() < count:
            self._buffers[0] = torch.empty(count, dtype=torch.uint8, device=self._device)
        target = self._buffers[0][:count].view(source.dtype).view(source.shape)
        stream.copy(target, source)
        return target
