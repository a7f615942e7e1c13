"""Copies of weights from the host to the device, while the device computes.

On CUDA the copies run on a stream of their own. While one weight is merged, the next one is copied
into the other of two buffers. So a whole transformer needs device memory for two weights only. The
host does not wait: it enqueues work on both streams, one weight after the other. The streams are
ordered in one place, `CopyStream.join`. Whoever uses `Staging.prefetch` calls `Staging.wait` at the
end, whatever happened, as `Staging.copy` does. Then nothing that is computed later, or allocated in
memory that was freed meanwhile, runs before a copy.

From memory that is not page-locked, such as a mapped file, CUDA copies through a buffer of its own,
and the host waits for it. Such sources pass through a ring of page-locked pieces instead: the host
copies one piece into the ring, which torch does in several threads, while the device copies the
piece before. docs/decisions.md says why no thread reads ahead.
"""

import logging
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from weights.serving.cancel import CheckCancelled, never_cancelled

logger = logging.getLogger(__name__)

PIECE = 32 << 20  # bytes: some milliseconds of reading, so that starting a copy weighs nothing
PIECES = 4


class CopyStream:
    """Copies from host memory to a CUDA device, on a stream beside the current one."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def needs_copy(self, source: Tensor) -> bool:
        """Whether a tensor is not on the device."""
        return source.device.type == "cpu"

    def blocks_host(self, source: Tensor) -> bool:
        """Whether a copy of the tensor makes the host wait, because its memory is pageable."""
        return not source.is_pinned()

    def pinned_buffer(self, size: int) -> Tensor:
        """Page-locked bytes on the host."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Enqueue a copy. It runs at any time between the joins before and after it."""
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def record_event(self) -> Callable[[], None]:
        """Return a function that makes the host wait for all copies enqueued so far."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event.synchronize

    def join(self) -> None:
        """Make what is enqueued on either stream from now on run after all before, on both."""
        current = torch.cuda.current_stream(self._stream.device)
        current.wait_stream(self._stream)
        self._stream.wait_stream(current)


def copy_stream(device: torch.device) -> CopyStream | None:
    """A copy stream for a device; None where it has none, as on a CPU."""
    return CopyStream(device) if device.type == "cuda" else None


class Ring:
    """A ring of page-locked pieces that copies from pageable memory pass through.

    It is allocated with the first copy. If that fails, copies are made without it.
    """

    def __init__(self) -> None:
        self._pieces: list[tuple[Tensor, Callable[[], None]]] | None = None

    def send(self, stream: CopyStream, target: Tensor, source: Tensor) -> None:
        """Enqueue copies of `source` (bytes on the host) into `target` (bytes on the device)."""
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
            self._pieces = [*self._pieces[1:], (piece, stream.record_event())]


def _pieces(stream: CopyStream) -> list[tuple[Tensor, Callable[[], None]]]:
    """The pieces, each with a function that waits until it is free; none if allocation fails."""
    try:
        return [(stream.pinned_buffer(PIECE), lambda: None) for _ in range(PIECES)]
    except RuntimeError as error:
        logger.warning("Weights are copied from the memory map without a buffer: %s", error)
        return []


class Staging:
    """Copies tensors to the device, each while the one before is used.

    Args:
        device: the device.
        stream: runs the copies. Without one, tensors are used where they are.
    """

    def __init__(self, device: torch.device, stream: CopyStream | None) -> None:
        self._device = device
        self._stream = stream
        self._ring = Ring()
        self._buffers = [torch.empty(0, dtype=torch.uint8, device=device)] * 2

    def prefetch(self, sources: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield each source on the device. It is valid until the next one is asked for."""
        if self._stream is None:
            yield from sources
            return
        near: Tensor | None = None
        copied = False
        for source in sources:
            # This copy runs after that of `near`, and after all use of the tensor before it, whose
            # buffer it takes. It runs beside the use of `near`, which is enqueued after the yield.
            comes = self._stream.needs_copy(source)
            if copied or comes:
                self._stream.join()
            copied = comes
            coming = self._send(self._stream, source)
            if near is not None:
                yield near
            near = coming
        if copied:
            self._stream.join()
        if near is not None:
            yield near

    def copy(
        self,
        targets: Iterable[Tensor],
        sources: Iterable[Tensor],
        check_cancelled: CheckCancelled = never_cancelled,
    ) -> None:
        """Copy each source into its target on the device, and wait as `wait` does.

        Args:
            targets: one for each source, of its shape.
            sources: on the device or the host.
            check_cancelled: called before each target is written; raises to stop.
        """
        try:
            for target, near in zip(targets, self.prefetch(sources), strict=True):
                check_cancelled()
                target.copy_(near)
        finally:
            self.wait()

    def wait(self) -> None:
        """Make what is enqueued from now on run after all copies; the host does not wait."""
        if self._stream is not None:
            self._stream.join()

    def _send(self, stream: CopyStream, source: Tensor) -> Tensor:
        if not stream.needs_copy(source):
            return source
        count = source.numel() * source.element_size()
        self._buffers.reverse()
        if self._buffers[0].numel() < count:
            self._buffers[0] = torch.empty(count, dtype=torch.uint8, device=self._device)
        room = self._buffers[0][:count]
        target = room.view(source.dtype).view(source.shape)
        if stream.blocks_host(source):
            self._ring.send(stream, room, source.detach().reshape(-1).view(torch.uint8))
        else:
            stream.copy(target, source)
        return target


def move(module: nn.Module, device: torch.device) -> None:
    """Move a module's parameters and buffers to a device, through `Staging` if it has streams."""
    stream = copy_stream(device)
    if stream is None:
        module.to(device)
        return
    tensors = [*module.parameters(), *module.buffers()]
    targets = [torch.empty_like(tensor, device=device) for tensor in tensors]
    Staging(device, stream).copy(targets, [tensor.detach() for tensor in tensors])
    for tensor, target in zip(tensors, targets, strict=True):
        tensor.data = target
