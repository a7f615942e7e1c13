"""Requests that a fleet answers as one server does, and what must be equal."""

import re
from typing import Any

import requests

from tests.fleet.running import ASYNC, SMALL

PREDICTIONS = "/predictions"
NO_WIDTH = {name: value for name, value in SMALL.items() if name != "width"}
JSON = {"headers": {"Content-Type": "application/json"}}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "prediction": ("POST", PREDICTIONS, {"json": {"input": {**SMALL, "num_outputs": 2}}}),
    "with an id": ("POST", PREDICTIONS, {"json": {"input": SMALL, "id": "mine"}}),
    "idempotent": ("PUT", f"{PREDICTIONS}/mine", {"json": {"input": SMALL}}),
    "other id": ("PUT", f"{PREDICTIONS}/mine", {"json": {"input": SMALL, "id": "other"}}),
    "out of range": ("POST", PREDICTIONS, {"json": {"input": {**SMALL, "width": 5000}}}),
    "null seed": ("POST", PREDICTIONS, {"json": {"input": {**SMALL, "seed": None}}}),
    "half a seed": ("POST", PREDICTIONS, {"json": {"input": {**SMALL, "seed": -0.5}}}),
    "null id": ("POST", PREDICTIONS, {"json": {"input": SMALL, "id": None}}),
    "waits": ("POST", PREDICTIONS, {"json": {"input": SMALL}, "headers": {"Prefer": "wait=5"}}),
    "text seed": ("POST", PREDICTIONS, {"json": {"input": {**SMALL, "seed": "7"}}}),
    "no prompt": ("POST", PREDICTIONS, {"json": {"input": {}}}),
    "no input": ("POST", PREDICTIONS, {"json": {}}),
    "text input": ("POST", PREDICTIONS, {"json": {"input": "x"}}),
    "a list": ("POST", PREDICTIONS, {"json": [1]}),
    "no JSON": ("POST", PREDICTIONS, {"data": "{", "headers": {"Content-Type": "text/plain"}}),
    "no number": ("POST", PREDICTIONS, {"data": '{"input": {"prompt": "x", "seed": NaN}}', **JSON}),
    "bad event": ("POST", PREDICTIONS, {"json": {"input": SMALL, "webhook_events_filter": ["x"]}}),
    "fails": ("POST", PREDICTIONS, {"json": {"input": NO_WIDTH, "id": "mine"}}),
    "no adapter": ("POST", PREDICTIONS, {"json": {"input": {**SMALL, "extra_lora": "no link"}}}),
    "no picture": ("POST", PREDICTIONS, {"json": {"input": {**SMALL, "image": "/etc/hostname"}}}),
    "asynchronous, out of range": (
        "PUT",
        f"{PREDICTIONS}/a",
        {"json": {"input": {**SMALL, "width": 5000}}, "headers": ASYNC},
    ),
    "cancel of none": ("POST", f"{PREDICTIONS}/none/cancel", {}),
    "get": ("GET", PREDICTIONS, {}),
    "get one": ("GET", f"{PREDICTIONS}/mine", {}),
    "get a cancel": ("GET", f"{PREDICTIONS}/mine/cancel", {}),
    "post the health": ("POST", "/health-check", {}),
    "root": ("GET", "/", {}),
    "schema": ("GET", "/openapi.json", {}),
    "health": ("GET", "/health-check", {}),
    "head": ("HEAD", "/health-check", {}),
    "nowhere": ("GET", "/nowhere", {}),
}


def comparable(response: requests.Response) -> tuple[int, Any, dict[str, str | None]]:
    """What must be equal: all but times, random ids, and what only a fleet has."""
    headers = {name: response.headers.get(name) for name in ("content-type", "allow")}
    if "json" not in (headers["content-type"] or "") or not response.content:
        return response.status_code, response.text, headers
    document = response.json()
    document.pop("replicas", None)
    if "setup" in document:
        document["setup"] = sorted(document["setup"])
    if str(document.get("id")).startswith("pred_"):
        document["id"] = "random"
    if "metrics" in document:
        document["metrics"] = names(document["metrics"])
        document["logs"] = re.sub(r"\r.*", "", document["logs"])  # progress, with times
    return response.status_code, document, headers


def names(metrics: Any) -> Any:
    return {k: names(v) for k, v in metrics.items()} if isinstance(metrics, dict) else None
