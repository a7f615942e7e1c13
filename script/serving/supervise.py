"""The command behind script/serve: Cog's server, which ends with an error when it cannot predict.

Cog's server outlives its worker. After a setup that failed, a kill -9, or when the system is out of
memory, it answers every request, and fails every prediction. Here it is stopped then, so that
systemd, Kubernetes or a shell loop can start it again. If this process is killed, so is the server.

A worker in setup outlives its server: it does not notice before setup is over, and until then it
holds memory that the next server needs, on the device too. This process adopts it, and kills it.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import urllib.request
from contextlib import suppress
from pathlib import Path

POLL_SECONDS = 1.0
TIMES = 2  # a healthcheck that was late once is no reason to stop
STOP_SECONDS = 10
BROKEN = {"SETUP_FAILED", "DEFUNCT", "UNHEALTHY"}
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # prctl(2)


def main(host: str, port: str) -> int:
    """Run the server until it ends; return its exit status, or 1 when it cannot predict."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        return run(host, port)
    finally:
        end_children()


def run(host: str, port: str) -> int:
    """Do what `main` says, without what the server leaves."""
    server = subprocess.Popen(
        [sys.executable, "-m", "cog.server.http", "--host", host],
        preexec_fn=end_with_the_parent,  # safe here: there is one thread
    )
    for number in SIGNALS:
        signal.signal(number, lambda number, _: server.send_signal(number))
    url = f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{port}/health-check"
    seen = 0
    while seen < TIMES:
        with suppress(subprocess.TimeoutExpired):
            exit_status = server.wait(POLL_SECONDS)
            return 128 - exit_status if exit_status < 0 else exit_status
        status = health(url)
        seen = seen + 1 if status in BROKEN else 0
    print(f"script/serve: {status}: no prediction can succeed; stopping", file=sys.stderr)
    server.terminate()
    try:
        server.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    return 1


def end_with_the_parent() -> None:
    """Have Linux send SIGTERM to this process when the one that started it is gone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def end_children() -> None:
    """Kill this process's children, those it has adopted among them, until none is left."""
    while children := _children():
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _children() -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]  # proc(5)
            found += [int(entry.name)] if int(parent) == os.getpid() else []
    return found


def health(url: str) -> str | None:
    """The status that /health-check gives; None where there is no answer (yet)."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=30) as answer:
            return str(json.load(answer)["status"])
    except (OSError, ValueError, LookupError):
        return None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
