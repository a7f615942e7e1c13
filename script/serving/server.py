"""The Cog server on a free loopback port, for scripts and tests: started, watched, stopped."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import requests

SERVE = Path(__file__).resolve().parents[1] / "serve"
SILENT_SECONDS = 600  # a first start downloads for an hour, but says so in its log
STOP_SECONDS = 5
LOGS = {"coglet::setup", "coglet::prediction"}  # what the predictor itself has logged
LATE_LOG = "coglet::user"  # and what it had logged of setup when the server was ready already


class ServerError(RuntimeError):
    """The server did not start, or answered with an error; the message is the server's."""


class Server:
    """A running server; a context manager that ends it by its process id.

    Args:
        environment: added to this process's; the deployment settings go here.
        on_log: called with every line that the predictor logs, in a thread of its own.
        command: what starts the server; takes `--port PORT` like script/serve, the default.
        patience: seconds that the server has to end by itself when it is stopped.
    """

    def __init__(
        self,
        environment: Mapping[str, str] | None = None,
        on_log: Callable[[str], None] | None = None,
        command: Sequence[str | Path] = (),
        patience: float = STOP_SECONDS,
    ) -> None:
        self._command = command or (SERVE,)
        self._environment = {**os.environ, **(environment or {})}
        self._on_log = on_log
        self._patience = patience
        self._tail: deque[str] = deque(maxlen=20)
        self._heard = 0.0  # when the log last had a line; monotonic
        self._session = requests.Session()
        self._session.trust_env = False  # loopback must not go through a proxy

    def __enter__(self) -> "Server":
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(
            [*self._command, "--port", str(port)],
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that Ctrl-C reaches us alone, and we stop it in order
        )
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The process id of the server, the parent of its worker."""
        return self._process.pid

    def request(self, method: str, path: str, **options: Any) -> requests.Response:
        """Send an HTTP request; repeats the 409 that the server gives between two predictions."""
        for _ in range(200):
            response = self._session.request(method, self.url + path, **options)
            if response.status_code != 409:
                break
            time.sleep(0.05)
        return response

    def predict(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Run one prediction and return the server's answer, of whatever status.

        Raises:
            ServerError: if the server refuses the inputs, in its own words.
        """
        response = self.request("POST", "/predictions", json={"input": dict(inputs)})
        if not response.ok:
            raise ServerError(f"HTTP {response.status_code}: {_details(response)}")
        answer: dict[str, Any] = response.json()
        return answer

    @property
    def running(self) -> bool:
        """Whether the server's process is there."""
        return self._process.poll() is None

    def stop(self) -> None:
        """Ask the server to end, then make it; returns when it and its worker are gone."""
        self._session.close()
        if self.running:
            self._process.terminate()
        self._reader.join(self._patience)  # the pipe closes when the worker, too, has ended
        self.kill()

    def kill(self) -> None:
        """End the server and its worker at once."""
        with suppress(ProcessLookupError):  # a worker in setup does not hear of the end
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join()
        if self._process.stdout:
            self._process.stdout.close()

    def _wait_until_ready(self) -> None:
        self._heard = time.monotonic()
        while time.monotonic() < self._heard + SILENT_SECONDS:
            if self._process.poll() is not None:
                self._reader.join(1)
                raise ServerError("the server ended:\n" + "\n".join(self._tail))
            try:
                health = self._session.get(f"{self.url}/health-check", timeout=5).json()
            except (requests.ConnectionError, requests.Timeout, requests.JSONDecodeError):
                health = {"status": "STARTING"}
            if health["status"] == "READY":
                return
            if health["status"] == "SETUP_FAILED":
                raise ServerError(f"setup failed:\n{health['setup']['logs']}")
            time.sleep(0.1)
        raise ServerError(
            f"the server is not ready, and has been silent for {SILENT_SECONDS} s:\n"
            + "\n".join(self._tail)
        )

    def _read_log(self) -> None:
        for line in self._process.stdout or ():
            self._heard = time.monotonic()
            try:
                record = json.loads(line)
                message, target = record["fields"]["message"], record["target"]
            except (ValueError, LookupError, TypeError):
                message, target = line.rstrip("\n"), ""
            self._tail.append(message)
            ours = target in LOGS and "source" in record["fields"]
            if self._on_log and (ours or target == LATE_LOG):
                self._on_log(message)


def processes(command: bytes, mark: str) -> set[int]:
    """Ids of the processes with `command` in their command line, and in their environment `mark`.

    A mark, `NAME=value`, tells the processes that one server was started with from all others.
    """
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            started_with = (entry / "environ").read_bytes().split(b"\0")
            if command in (entry / "cmdline").read_bytes() and mark.encode() in started_with:
                found.add(int(entry.name))
    return found


def resident(pid: int) -> int:
    """Bytes of a process that are in memory and no file's."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def free_port() -> int:
    """A port of the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _details(response: requests.Response) -> str:
    """The reasons of a refusal, each with the input that it is about."""
    try:
        details = response.json()["detail"]
        return "; ".join(f"{d['loc'][-1]}: {d['msg']}" for d in details)
    except (ValueError, LookupError, TypeError):
        return response.text
