"""Base values on their way to the device, beside what the device computes.

On CUDA the copies have a stream of their own: while one weight is merged, the next one crosses the
bus into the other of two buffers, so a whole transformer needs no more of the device than two
weights. The host does not wait for them: it puts the order of both streams down, one weight after
the other. The only point where order matters is `CopyStream.meet`, and whoever uses `bring` calls
`wait` at its end, whatever happened, so that nothing computed later, or allocated in memory given
back meanwhile, can come before a copy.

From memory that is not page-locked, as the map of a file, CUDA copies through a buffer of its own,
and the host waits all the while. So such sources pass through a ring of page-locked pieces: the
host copies one piece into it, which torch does in several threads, while the device copies the one
before. A thread that reads ahead was refused: it would hide only the host's other work in a merge,
microseconds for each weight, where reading it takes milliseconds.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

PIECE = 32 << 20  # bytes: some milliseconds of reading, so that starting a copy weighs nothing
PIECES = 4


class CopyStream(Protocol):
    """An order of copies beside the order of what the current stream computes."""

    def carries(self, source: Tensor) -> bool:
        """Whether a tensor is elsewhere, and has to be brought to the device."""
        ...

    def holds_up(self, source: Tensor) -> bool:
        """Whether the host would wait for copies of a tensor, because of the memory it is in."""
        ...

    def piece(self, size: int) -> Tensor:
        """Bytes on the host, of which copies do not hold it up."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Put a copy down; it is made at any time between the meetings before and after."""
        ...

    def mark(self) -> Callable[[], None]:
        """A function that waits, on the host, until all copies that were put down are made."""
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

    def holds_up(self, source: Tensor) -> bool:
        """See `CopyStream.holds_up`."""
        return not source.is_pinned()

    def piece(self, size: int) -> Tensor:
        """See `CopyStream.piece`."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def mark(self) -> Callable[[], None]:
        """See `CopyStream.mark`."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event.synchronize

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


class Ring:
    """Pieces of memory on the host that large copies pass through, each while others are copied.

    The memory is taken with the first copy. If there is none, copies are made without it.
    """

    def __init__(self) -> None:
        self._pieces: list[tuple[Tensor, Callable[[], None]]] | None = None

    def send(self, stream: CopyStream, target: Tensor, source: Tensor) -> None:
        """Put down copies of a source [bytes] into a target [bytes] on the device."""
        if self._pieces is None:
            self._pieces = _pieces(stream)
        if not self._pieces:
            stream.copy(target, source)
            return
        for start in range(0, source.numel(), PIECE):
            here = source[start : start + PIECE]
            piece, wait = self._pieces[0]
            wait()  # for the copy of what was in it before
            part = piece[: here.numel()].copy_(here)
            stream.copy(target[start : start + PIECE], part)
            self._pieces = [*self._pieces[1:], (piece, stream.mark())]


def _pieces(stream: CopyStream) -> list[tuple[Tensor, Callable[[], None]]]:
    """Memory for a ring, and how to wait until it is free; none where there is none to lock."""
    try:
        return [(stream.piece(PIECE), lambda: None) for _ in range(PIECES)]
    except RuntimeError as error:
        logger.warning("Weights are copied from the memory map without a buffer: %s", error)
        return []


class Staging:
    """Brings tensors to the device, each while the one before is used.

    Args:
        device: where they are wanted.
        stream: that copies them; None: they are handed on as they are.
    """

    def __init__(self, device: torch.device, stream: CopyStream | None) -> None:
        self._device = device
        self._stream = stream
        self._ring = Ring()
        self._buffers = [torch.empty(0, dtype=torch.uint8, device=device)] * 2

    def bring(self, sources: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield each source as it is on the device, valid until the next one is asked for."""
        if self._stream is None:
            yield from sources
            return
        near: Tensor | None = None
        copied = False
        for source in sources:
            # After the copy of `near`, and after all use of the tensor before it, whose buffer
            # this source takes; beside the use of `near`, which is put down after the yield.
            comes = self._stream.carries(source)
            if copied or comes:
                self._stream.meet()
            copied = comes
            coming = self._send(self._stream, source)
            if near is not None:
                yield near
            near = coming
        if copied:
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
        room = self._buffers[0][:count]
        target = room.view(source.dtype).view(source.shape)
        if stream.holds_up(source):
            self._ring.send(stream, room, source.detach().reshape(-1).view(torch.uint8))
        else:
            stream.copy(target, source)
        return target


def move(module: nn.Module, device: torch.device) -> None:
    """Bring a module's parameters and buffers to a device, through `Staging` if it has streams."""
    stream = copy_stream(device)
    staging, tensors = Staging(device, stream), [*module.parameters(), *module.buffers()]
    if stream is None:
        module.to(device)
        return
    try:
        for tensor, near in zip(tensors, staging.bring(t.detach() for t in tensors), strict=True):
            tensor.data = near.clone()
    finally:
        staging.wait()
