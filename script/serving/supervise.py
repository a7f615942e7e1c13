"""The command behind script/serve: Cog's server, which ends with an error when it cannot predict.

Cog's server outlives its worker. After a setup that failed, a kill -9, or when the system is out of
memory, it answers every request, and fails every prediction. Here it is stopped then, so that
systemd, Kubernetes or a shell loop can start it again. If this process is killed, so is the server.

A worker in setup outlives its server: it does not notice before setup is over, and until then it
holds memory that the next server needs, on the device too. This process adopts it, and kills it;
if this process is killed with SIGKILL, nobody does.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

POLL_SECONDS = 1.0
TIMES = 2  # a healthcheck that was late once is no reason to stop
STOP_SECONDS = 10
GRACE_SECONDS = 2  # of a worker whose server has ended
BROKEN = {"SETUP_FAILED", "DEFUNCT", "UNHEALTHY"}
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # prctl(2)


def main(host: str, port: str) -> int:
    """Run the server, and end what it leaves; return what `run` does."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    others = children(os.getpid())
    try:
        return run(host, port)
    finally:
        end_children(others)


def run(host: str, port: str) -> int:
    """Run the server until it ends; return its exit status, or 1 when it cannot predict."""
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


def end_children(others: set[int]) -> None:
    """Wait for what the server has left, and kill what does not end by itself.

    Args:
        others: children that are not the server's; a shell had them before its `exec`.
    """
    deadline = time.monotonic() + GRACE_SECONDS
    while left := children(os.getpid()) - others:
        for child in left:
            try:
                ended, _ = os.waitpid(child, os.WNOHANG)
            except ChildProcessError:  # /proc is of another namespace
                others = {*others, child}
                continue
            if not ended and time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.05)


def children(pid: int) -> set[int]:
    """The process ids of a process's children."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            after_name = (entry / "stat").read_bytes().rpartition(b")")[2]  # see proc(5)
            if int(after_name.split()[1]) == pid:
                found.add(int(entry.name))
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
