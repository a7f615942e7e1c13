"""A receiver of Cog's webhooks on loopback."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import chain, repeat
from typing import Any

POLL_SECONDS = 0.01  # between two looks whether it is to end


@contextmanager
def webhook(refusals: int = 0) -> Iterator[tuple[str, list[dict[str, Any]], threading.Event]]:
    """Receive the server's webhooks: the URL, the payloads, and an event for each arrival.

    The first `refusals` are answered with 503, and are not among the payloads.
    """
    statuses = chain(repeat(503, refusals), repeat(200))
    payloads: list[dict[str, Any]] = []
    arrived = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status = next(statuses)
            if status == 200:
                payloads.append(payload)
            self.send_response(status)
            self.end_headers()
            if status == 200:
                arrived.set()

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as receiver:
        thread = threading.Thread(target=receiver.serve_forever, args=(POLL_SECONDS,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{receiver.server_port}/", payloads, arrived
        finally:
            receiver.shutdown()
            thread.join()
