"""The command behind script/serve: Cog's server, which ends with an error when its worker is gone.

Cog's server outlives its worker. After a kill -9, or when the system is out of memory, it answers
every request, and fails every prediction. Here it is stopped then, so that systemd, Kubernetes or a
shell loop can start it again.
"""

import json
import signal
import subprocess
import sys
import urllib.request
from contextlib import suppress

POLL_SECONDS = 1.0
TIMES = 2  # a healthcheck that was late once is no reason to stop
STOP_SECONDS = 10
GONE = {"DEFUNCT", "UNHEALTHY"}
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main(host: str, port: str) -> int:
    """Run the server until it ends; return its exit status, or 1 when its worker is gone."""
    server = subprocess.Popen([sys.executable, "-m", "cog.server.http", "--host", host])
    for number in SIGNALS:
        signal.signal(number, lambda number, _: server.send_signal(number))
    url = f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{port}/health-check"
    seen = 0
    while seen < TIMES:
        with suppress(subprocess.TimeoutExpired):
            status = server.wait(POLL_SECONDS)
            return 128 - status if status < 0 else status
        seen = seen + 1 if health(url) in GONE else 0
    print(
        "script/serve: the worker is gone, and no prediction can succeed: stopping", file=sys.stderr
    )
    server.terminate()
    try:
        server.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    return 1


def health(url: str) -> str | None:
    """The status that /health-check gives; None where there is no answer (yet)."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=30) as answer:
            status: str = json.load(answer)["status"]
            return status
    except (OSError, ValueError, LookupError):
        return None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
