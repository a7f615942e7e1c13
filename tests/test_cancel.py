"""A cancel through the HTTP API, in every stage: it ends soon, and leaves nothing behind."""

import re
import time
import uuid
from typing import Any

import pytest
import requests

from tests.support import QUICK, LoggedServer, same, webhook

LARGE = {"aspect_ratio": "custom", "width": 1440, "height": 1440, "output_format": "png"}
STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    # stage: (the line of the log after which the cancel is sent, inputs that make it long)
    "text": ("Using seed", {"prompt": "red " * 2_000_000, "num_inference_steps": 50}),
    "denoising": (r"3/50 \[", {"num_inference_steps": 50}),
    "decoding": (r"1/1 \[", {"num_inference_steps": 1, **LARGE}),
    "encoding": ("Safety: image 1", {"num_inference_steps": 1, **LARGE}),
}


def wait_for_line(server: LoggedServer, pattern: str, start: int, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not any(re.search(pattern, line) for line in server.lines[start:]):
        assert time.monotonic() < deadline, f"no line with {pattern!r}"
        time.sleep(0.005)


def cancel_in(server: LoggedServer, stage: str) -> tuple[dict[str, Any], float]:
    """Start an asynchronous prediction, cancel it in a stage; its final state, and the wait."""
    line, inputs = STAGES[stage]
    start, prediction = len(server.lines), uuid.uuid4().hex
    with webhook() as (url, payloads, arrived):
        body = {
            "input": {**QUICK, **inputs},
            "webhook": url,
            "webhook_events_filter": ["completed"],
        }
        path = f"/predictions/{prediction}"
        headers = {"Prefer": "respond-async"}
        assert server.server.request("PUT", path, json=body, headers=headers).status_code == 202
        wait_for_line(server, line, start)
        sent = time.monotonic()
        assert server.server.request("POST", f"{path}/cancel").status_code == 200
        assert arrived.wait(30)
        return payloads[-1], time.monotonic() - sent


@pytest.mark.parametrize("stage", STAGES)
def test_cancel(server, stage: str) -> None:
    undisturbed = server.draw(output_format="png").image
    final, waited = cancel_in(server, stage)
    assert final["status"] == "canceled", final
    assert not final.get("output")
    if stage == "denoising":
        steps = [int(step) for step in re.findall(r"(\d+)/50 \[", final["logs"])]
        assert 3 <= max(steps) < 50
    assert waited < 6  # seconds; a decoding or a file of 1440 x 1440 takes one or two of them
    leftovers = [path for path in server.outputs.rglob("*") if path.is_file()]
    assert leftovers == []
    assert same(server.draw(output_format="png").image, undisturbed)


def test_a_client_that_hangs_up_cancels(server) -> None:
    undisturbed = server.draw(output_format="png").image
    start = len(server.lines)
    with pytest.raises(requests.ReadTimeout):
        server.server.request(
            "POST",
            "/predictions",
            json={"input": {**QUICK, "num_inference_steps": 50, "num_outputs": 4}},
            timeout=0.3,
        )
    assert same(server.draw(output_format="png").image, undisturbed)
    assert len([line for line in server.lines[start:] if "Safety: image" in line]) < 5
