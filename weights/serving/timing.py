"""Seconds by stage of a request."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

STAGES = (
    "input",  # reading, resizing and encoding what the caller sent
    "adapters",  # getting and merging them
    "text",
    "denoising",
    "decoding",
    "safety",
    "encoding",  # writing files; while the next image is generated
)


class Stopwatch:
    """Adds up wall-clock seconds by stage."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside the block to a stage, also when the block fails."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start
