"""A running fleet, asked as a caller does."""

import os
import signal
import subprocess
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import requests

from serving.server import Server, processes
from tests.support import inputs
from tests.support.inputs import QUICK
from tests.support.server import WORKER, wait_for

ROOT = Path(__file__).parent.parent.parent
MARK = "STARTED_FOR_FLEET_IN"
QUEUE = 16
SMALL = {**QUICK, **inputs.SMALL}
LONG = {**QUICK, "num_inference_steps": 50, "num_outputs": 4}  # as long as the test wants
REPLICA = b"Replica:flux:Replica"
ASYNC = {"Prefer": "respond-async"}


class Fleet:
    """A running script/fleet, asked as a caller does: without repeating anything."""

    def __init__(self, server: Server, directory: Path) -> None:
        self.url, self.directory = server.url, directory

    def ask(self, method: str, path: str, **options: Any) -> requests.Response:
        return ask(self.url, method, path, **options)

    def predict(self, **inputs: Any) -> dict[str, Any]:
        response = self.ask("POST", "/predictions", json={"input": {**SMALL, **inputs}})
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        assert answer["status"] == "succeeded", answer
        return answer

    def health(self) -> dict[str, Any]:
        document: dict[str, Any] = self.ask("GET", "/health-check").json()
        return document

    def cancel(self, name: int | str) -> int:
        """Cancel a prediction by its id; returns the status of the answer."""
        return self.ask("POST", f"/predictions/{name}/cancel").status_code

    def kill(self, command: bytes) -> None:
        """Kill -9 of one process with this in its command."""
        os.kill(min(self.pids(command)), signal.SIGKILL)

    def pids(self, command: bytes) -> set[int]:
        """Of the processes with this in their command that belong to this fleet."""
        return processes(command, f"{MARK}={self.directory}")

    def wait_until_whole(self) -> None:
        wait_for(lambda: self.health()["replicas"] == len(self.pids(WORKER)) == 2)


def ask(url: str, method: str, path: str, **options: Any) -> requests.Response:
    with requests.Session() as session:
        session.trust_env = False
        return session.request(method, url + path, **options)


def hang_up_until(started: threading.Event, server: Server) -> None:
    """Ask for the health again and again, without waiting for it: that must disturb nobody."""
    while not started.wait(0.2):
        with suppress(AttributeError, requests.RequestException):  # it has no address at first
            ask(server.url, "GET", "/health-check", timeout=0.05)


def fill(fleet: Fleet, pool: ThreadPoolExecutor, *adapters: str, **fields: Any) -> None:
    """Have both replicas busy, with predictions 0 and 1, until these are cancelled."""
    inputs = [{**LONG, "replicate_weights": adapter} for adapter in adapters] or [LONG, LONG]
    asked = [start_long(fleet, pool, n, input=each, **fields) for n, each in enumerate(inputs)]
    assert [future.result().status_code for future in asked] == [202, 202]


def hold_both(fleet: Fleet, pool: ThreadPoolExecutor, *paths: str) -> None:
    """Have each replica generate with an adapter of its own, at the same time."""
    inputs = [{"replicate_weights": path, "num_inference_steps": 4} for path in paths]
    list(pool.map(lambda each: fleet.predict(**each), inputs))


def start_long(
    fleet: Fleet, pool: ThreadPoolExecutor, number: int, **fields: Any
) -> "Future[requests.Response]":
    path, body = f"/predictions/{number}", {"input": LONG, **fields}
    return pool.submit(fleet.ask, "PUT", path, json=body, headers=ASYNC)


def run(program: str) -> str:
    """Run a program in the environment of Ray; return what it prints."""
    result = subprocess.run(
        [ROOT / ".cog" / "fleet" / "bin" / "python", "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": "script:.", "RAY_USAGE_STATS_ENABLED": "0"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=60,
    )
    return result.stdout.strip()
