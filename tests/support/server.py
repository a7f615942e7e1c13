"""The real server, with every line that it logs; its answers as pictures; its webhooks."""

import base64
import io
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from serving.server import Server
from serving.webhook import webhook
from tests.support.inputs import QUICK

THREADS = {"OMP_NUM_THREADS": "1"}
"""For servers whose pictures are compared to the bit: all compute with one thread."""
SERVER = b"cog.server.http"  # in the command of the process that answers HTTP
WORKER = b"coglet.server._run_worker"  # and of the one that predicts


@dataclass
class Answer:
    """A prediction's answer, with the outputs as bytes."""

    status: str
    error: str | None
    logs: str
    metrics: dict[str, Any]
    files: list[bytes]

    @property
    def images(self) -> list[Image.Image]:
        return [Image.open(io.BytesIO(content)) for content in self.files]

    @property
    def image(self) -> Image.Image:
        (image,) = self.images
        return image


@dataclass
class LoggedServer:
    """A running server, every line that it has logged, and its directories."""

    server: Server
    outputs: Path
    temporary: Path
    lines: list[str] = field(default_factory=list)

    def predict(self, **inputs: Any) -> Answer:
        """Predict with QUICK's inputs, save where others are given; None takes one out."""
        merged = {**QUICK, **inputs}
        answer = self.server.predict({k: v for k, v in merged.items() if v is not None})
        return Answer(
            status=answer["status"],
            error=answer.get("error"),
            logs=answer.get("logs", ""),
            metrics=answer.get("metrics", {}),
            files=[base64.b64decode(uri.partition(",")[2]) for uri in answer.get("output") or ()],
        )

    def generate(self, **inputs: Any) -> Answer:
        """Predict and insist on success."""
        answer = self.predict(**inputs)
        assert answer.status == "succeeded", answer.error
        return answer

    def fail(self, **inputs: Any) -> str:
        """Predict, insist on a failed prediction, and return its error."""
        answer = self.predict(**inputs)
        assert answer.status == "failed"
        assert answer.error
        return answer.error

    def cancel(self, after: str, **inputs: Any) -> tuple[dict[str, Any], float]:
        """Cancel an asynchronous prediction once the log has a line that matches `after`.

        Returns:
            its final state, and the seconds from the cancel to that.
        """
        start, path = len(self.lines), f"/predictions/{uuid.uuid4().hex}"
        with webhook() as (url, payloads, arrived):
            body = {
                "input": {**QUICK, **inputs},
                "webhook": url,
                "webhook_events_filter": ["completed"],
            }
            headers = {"Prefer": "respond-async"}
            assert self.server.request("PUT", path, json=body, headers=headers).status_code == 202
            self._wait_for_line(after, start)
            sent = time.monotonic()
            assert self.server.request("POST", f"{path}/cancel").status_code == 200
            assert arrived.wait(30)
            return payloads[-1], time.monotonic() - sent

    def _wait_for_line(self, pattern: str, start: int, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not any(re.search(pattern, line) for line in self.lines[start:]):
            assert time.monotonic() < deadline, f"no line with {pattern!r}"
            time.sleep(0.005)


@contextmanager
def logged_server(outputs: Path, **environment: str) -> Iterator[LoggedServer]:
    """Run a server whose output files go to a directory; on the device that TESTS_DEVICE names."""
    lines: list[str] = []
    temporary = outputs.with_name(f"{outputs.name}-temporary")
    temporary.mkdir()
    settings = {
        "FLUX_OUTPUT_DIRECTORY": str(outputs),
        "TMPDIR": str(temporary),
        "FLUX_CHECKPOINT": "nano",
        "FLUX_DEVICE": os.environ.get("TESTS_DEVICE", "cpu"),
        **THREADS,
        **environment,
    }
    with Server(settings, on_log=lines.append) as server:
        yield LoggedServer(server, outputs, temporary, lines)


def wait_for(condition: Callable[[], object], seconds: float = 60, pause: float = 0.05) -> None:
    """Insist that something comes true in so many seconds; it is looked at after each pause."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(pause)
