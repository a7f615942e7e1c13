"""Cancels over HTTP, counted by the stage that they meet: how soon they end, and what is lost.

A stage begins with a line of the log, or with the arrival of a download; the cancel is sent then.
Afterwards a reference image must be the same to the byte, and the output directory empty.
"""

import re
import statistics
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from benchmarks.shared.inputs import BASE, SMALL
from benchmarks.shared.report import parser, report
from miniature.evaluation.effects import adapter_inputs
from serving.server import Server
from serving.webhook import webhook

LARGE = {"aspect_ratio": "custom", "width": 1024, "height": 1024, "num_inference_steps": 1}
REFERENCE = {**BASE, **SMALL, "num_inference_steps": 2}
STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    # stage: the line of the log that it begins with, and inputs that make it long
    "adapter": ("Adapter ", {**adapter_inputs("inverted"), "num_inference_steps": 50}),
    "text": ("Using seed", {"prompt": "red " * 2_000_000, "num_inference_steps": 50}),
    "denoising": (r"3/50 \[", {"num_inference_steps": 50}),
    "decoding": (r"1/1 \[", LARGE),
    "encoding": ("Safety: image 1", LARGE),
}


@contextmanager
def dripping() -> Iterator[tuple[str, threading.Event]]:
    """A file that never ends: its URL, and an event for the arrival of a request for it."""
    arrived, ended = threading.Event(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(10**8))
            self.end_headers()
            arrived.set()
            while not ended.wait(0.05):
                try:
                    self.wfile.write(bytes(100))
                except OSError:  # the client has gone
                    return

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/style.safetensors", arrived
        finally:
            ended.set()
            server.shutdown()


def cancelled(
    server: Server, inputs: dict[str, Any], has_begun: Callable[[], object]
) -> tuple[str, float]:
    """Cancel a prediction once a stage has begun: its final status, and the seconds to that."""
    path = f"/predictions/{uuid.uuid4().hex}"
    with webhook() as (url, payloads, arrived):
        hook = {"webhook": url, "webhook_events_filter": ["completed"]}
        body = {"input": {**BASE, **inputs}, **hook}
        answer = server.request("PUT", path, json=body, headers={"Prefer": "respond-async"})
        assert answer.status_code == 202, answer.text
        while not has_begun() and not arrived.is_set():
            time.sleep(0.002)
        start = time.monotonic()
        server.request("POST", f"{path}/cancel")
        assert arrived.wait(60), "no end within a minute"
        return payloads[-1]["status"], time.monotonic() - start


def main() -> int:
    command = parser()
    command.add_argument("--each", type=int, default=20, metavar="N", help="cancels of a stage")
    arguments = command.parse_args()
    lines: list[str] = []
    with tempfile.TemporaryDirectory(prefix="cancels-") as directory, dripping() as (url, asked):
        outputs = Path(directory) / "outputs"
        settings = {
            "FLUX_CHECKPOINT": "nano",
            "FLUX_DEVICE": "cpu",
            "FLUX_OUTPUT_DIRECTORY": str(outputs),
            "FLUX_CACHE_DIRECTORY": f"{directory}/cache",
            "LORA_ALLOW_PRIVATE_HOSTS": "true",
        }
        with Server(settings, on_log=lines.append) as server:
            before = server.predict(REFERENCE)["output"]

            def download() -> tuple[str, float]:
                asked.clear()
                return cancelled(server, {"replicate_weights": url}, asked.is_set)

            def stage(name: str) -> tuple[str, float]:
                pattern, inputs = STAGES[name]
                count = len(lines)
                return cancelled(
                    server, inputs, lambda: any(re.search(pattern, x) for x in lines[count:])
                )

            found = {"download": [download() for _ in range(arguments.each)]}
            found |= {name: [stage(name) for _ in range(arguments.each)] for name in STAGES}
            left = sum(1 for path in outputs.rglob("*") if path.is_file())
            same = server.predict(REFERENCE)["output"] == before
    rows = {
        name: {
            "ended as": dict(Counter(status for status, _ in ends)),
            "seconds, median": round(statistics.median(seconds for _, seconds in ends), 3),
            "seconds, longest": round(max(seconds for _, seconds in ends), 3),
        }
        for name, ends in found.items()
    }
    report(
        "cancels",
        {"stages": rows, "files left": left, "reference image is the same": same},
        arguments.json,
    )
    return 0 if same and not left else 1


if __name__ == "__main__":
    raise SystemExit(main())
