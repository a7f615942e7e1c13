#!/usr/bin/env python3
"""In place of script/serve: a server that loses the first cancel, as Cog's can if it comes early.

It knows of a prediction a moment after it was sent, and GET /health-check tells how many cancels of
it there were.
"""

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

known, over = threading.Event(), threading.Event()
cancels = []


class Forgetful(BaseHTTPRequestHandler):
    """One prediction, which ends with the second cancel."""

    def do_GET(self) -> None:
        self._answer(200, "BUSY" if known.is_set() and not over.is_set() else "READY")

    def do_PUT(self) -> None:
        time.sleep(0.3)
        known.set()
        if self.headers["Prefer"] != "respond-async":
            over.wait()
        self._answer(202, "starting")

    def do_POST(self) -> None:
        if known.is_set() and not over.is_set():
            cancels.append(self.path)
        if len(cancels) == 2:
            over.set()
        self._answer(200 if known.is_set() else 404, "")

    def _answer(self, code: int, status: str) -> None:
        content = json.dumps({"status": status, "cancels": len(cancels)}).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


ThreadingHTTPServer(("127.0.0.1", int(sys.argv[-1])), Forgetful).serve_forever()
