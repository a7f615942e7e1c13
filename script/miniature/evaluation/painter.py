"""Pictures from the running predictor, each generated once and kept on disk."""

import base64
import hashlib
import io
import json
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from queue import Queue
from types import TracebackType
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from serving.server import Server, ServerError

logger = logging.getLogger(__name__)

NANO = Path(__file__).resolve().parents[3] / "weights" / "nano"
ADAPTERS = NANO / "adapters"
SECONDS = "seconds"  # a picture's text entry: how long the prediction took
LOG_EVERY = 10  # pictures
# Exact pixels, and every picture delivered: what is measured is the model, not its censor.
CONSTANT = {"output_format": "png", "disable_safety_checker": True}

Inputs = Mapping[str, Any]


class Painter:
    """Generates through the real Cog server, started when the first picture is asked for.

    A context manager that stops what it has started. Pictures are kept by checkpoint and inputs,
    so what was interrupted goes on where it was, and a changed checkpoint is generated anew.

    Args:
        directory: where the pictures are kept.
        workers: servers to generate with, the cores divided between them.
    """

    def __init__(self, directory: Path, workers: int = 1) -> None:
        self.checkpoint = digest(NANO)
        self._directory = directory / self.checkpoint
        self._directory.mkdir(parents=True, exist_ok=True)
        self._workers = workers
        self._servers: Queue[Server] = Queue()
        self._running = ExitStack()

    def __enter__(self) -> "Painter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._running.close()

    def generate(self, requests: Sequence[Inputs]) -> list[Image.Image]:
        """The pictures of requests of one picture each, with a seed, in order.

        Raises:
            ServerError: if the server refuses or fails one.
        """
        paths = [self._path(request) for request in requests]
        missing = {
            path: request
            for path, request in zip(paths, requests, strict=True)
            if not path.is_file()
        }
        if missing:
            self._start()
            with ThreadPoolExecutor(self._workers) as pool:
                generating = pool.map(self._generate, missing, missing.values())
                try:
                    for number, _ in enumerate(generating, 1):
                        if number % LOG_EVERY == 0 or number == len(missing):
                            logger.info("%d of %d pictures", number, len(missing))
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
        return [_read(path) for path in paths]

    def _path(self, request: Inputs) -> Path:
        if "seed" not in request:
            raise ValueError(f"a request without a seed cannot be repeated: {dict(request)}")
        text = json.dumps({**CONSTANT, **request}, sort_keys=True)
        return self._directory / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.png"

    def _start(self) -> None:
        if self._servers.empty():
            threads = max(1, (os.cpu_count() or 1) // self._workers)
            environment = {"FLUX_CHECKPOINT": "nano", "OMP_NUM_THREADS": str(threads)}
            for _ in range(self._workers):
                self._servers.put(self._running.enter_context(Server(environment)))

    def _generate(self, path: Path, request: Inputs) -> None:
        server = self._servers.get()
        try:
            answer = server.predict({**CONSTANT, **request})
        finally:
            self._servers.put(server)
        if answer["status"] != "succeeded":
            raise ServerError(f"{answer['status']}: {answer.get('error')}; inputs: {request}")
        (uri,) = answer["output"]
        text = PngInfo()
        text.add_text(SECONDS, str(answer["metrics"]["predict_time"]))
        partial = path.with_suffix(".partial")
        with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
            image.save(partial, "PNG", pnginfo=text)
        partial.replace(path)


def digest(checkpoint: Path) -> str:
    """A short digest of a checkpoint's files, but for the adapters in it: digest(ADAPTERS)."""
    result, adapters = hashlib.sha256(), checkpoint / ADAPTERS.name
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and adapters not in path.parents:
            result.update(f"{path.relative_to(checkpoint)}\n".encode())
            result.update(hashlib.sha256(path.read_bytes()).digest())
    return result.hexdigest()[:16]


def data_uri(content: Image.Image | Path | bytes) -> str:
    """A picture, a file, or bytes, as an input of a request."""
    kind = "application/octet-stream"
    if isinstance(content, Path):
        content = content.read_bytes()
    elif isinstance(content, Image.Image):
        buffer, kind = io.BytesIO(), "image/png"
        content.save(buffer, "PNG")
        content = buffer.getvalue()
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _read(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
    return image
