#!/usr/bin/env python3
"""In place of script/serve: it loses the first cancel, as Cog's server does when it comes early."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

asked, cancelled_once, over = threading.Event(), threading.Event(), threading.Event()


class Forgetful(BaseHTTPRequestHandler):
    """One prediction, which ends with the second cancel."""

    def do_GET(self) -> None:
        self._answer(200, "BUSY" if asked.is_set() and not over.is_set() else "READY")

    def do_PUT(self) -> None:
        asked.set()
        if self.headers["Prefer"] != "respond-async":
            over.wait()
        self._answer(202, "starting")

    def do_POST(self) -> None:
        (over if cancelled_once.is_set() else cancelled_once).set()
        self._answer(200, "")

    def _answer(self, code: int, status: str) -> None:
        content = json.dumps({"status": status}).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


ThreadingHTTPServer(("127.0.0.1", int(sys.argv[-1])), Forgetful).serve_forever()
