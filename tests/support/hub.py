"""A stand-in for everything that adapters are fetched from, on loopback.

It speaks HTTP as plain file servers do (ETag, ranges, redirects) and misbehaves on demand;
services.py adds the shapes of Hugging Face, CivitAI and Replicate. Storage is reached under
another host name (localhost instead of 127.0.0.1), so that what must not cross hosts is seen.

    with Hub() as hub:
        url = hub.add_file("/files/lora.safetensors", content)
        hub.fail("/files/", 503, times=2)
        ...
        assert hub.count("GET", "/files/") == 3
"""

import hashlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass(frozen=True)
class Request:
    """One request as it arrived; path is decoded and without the query."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]

    @property
    def host(self) -> str:
        return self.headers.get("host", "").partition(":")[0]

    @property
    def token(self) -> str | None:
        return self.headers.get("authorization", "").removeprefix("Bearer ") or None


@dataclass(frozen=True)
class Reply:
    """What to answer; `ranges` and `if_range` say whether such headers are honoured for it."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    ranges: bool = False
    if_range: bool = True


Responder = Callable[[Request], Reply]


@dataclass
class Fault:
    """A misbehaviour for the next `times` requests whose path contains `part`."""

    part: str
    times: int
    reply: Reply | None = None
    cut_after: int | None = None
    drip: tuple[int, float] | None = None
    dripping_header: bool = False

    def matches(self, request: Request) -> bool:
        return self.times > 0 and self.part in request.path


def redirect(url: str, status: int = 302, **headers: str) -> Reply:
    return Reply(status=status, headers={"Location": url, **headers})


class Hub:
    """The server, in a thread of this process; start and stop, or use it as a context."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self._faults: list[Fault] = []
        self._routes: dict[str, Responder] = {}
        self._fallbacks: list[Callable[[Request], Reply | None]] = []
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def storage_url(self) -> str:
        """The same server under another host name."""
        return f"http://localhost:{self._server.server_port}"

    def start(self) -> Self:
        self._thread.start()
        return self

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def route(self, path: str, responder: Responder) -> None:
        """Answer requests for exactly this path."""
        self._routes[path] = responder

    def fallback(self, responder: Callable[[Request], Reply | None]) -> None:
        """Answer requests for paths without a route; None passes on to the next."""
        self._fallbacks.append(responder)

    def add_file(
        self,
        path: str,
        content: bytes,
        *,
        etag: bool = True,
        ranges: bool = True,
        if_range: bool = True,
        headers: Mapping[str, str] | None = None,
    ) -> str:
        """Serve a file and return its URL; adding it again replaces it.

        Some servers ignore If-Range, and send a range of whatever the file is now.
        """
        digest = hashlib.md5(content).hexdigest()
        validators = {"ETag": f'"{digest}"'} if etag else {}
        named = {**validators, **(headers or {})}
        reply = Reply(content, headers=named, ranges=ranges, if_range=if_range)
        self.route(path, lambda _: reply)
        return self.url + path

    def add_redirect(self, path: str, target: str) -> str:
        """Redirect a path to a URL, and return the URL of the path."""
        self.route(path, lambda _: redirect(target))
        return self.url + path

    def fail(
        self,
        part: str,
        status: int,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        times: int = 1,
    ) -> None:
        """Answer the next requests with a status instead."""
        self._faults.append(Fault(part, times, Reply(body, status, headers or {})))

    def cut(self, part: str, after: int, times: int = 1) -> None:
        """Break the connection of the next requests after that many bytes of the body."""
        self._faults.append(Fault(part, times, cut_after=after))

    def drip(self, part: str, size: int, seconds: float, times: int = 1) -> None:
        """Send the body of the next requests in pieces of a size, with pauses between."""
        self._faults.append(Fault(part, times, drip=(size, seconds)))

    def drip_header(self, part: str, times: int = 1) -> None:
        """Send the header of the next requests for two seconds, a byte now and then."""
        self._faults.append(Fault(part, times, dripping_header=True))

    def heal(self) -> None:
        """Drop all faults that are still to come."""
        with self._lock:
            self._faults.clear()

    def count(self, method: str, part: str) -> int:
        """How many requests of a method had a path with this part."""
        return len(self.seen(method, part))

    def seen(self, method: str, part: str) -> list[Request]:
        return [r for r in self.requests if r.method == method and part in r.path]

    def answer(self, request: Request) -> tuple[Reply, Fault | None]:
        """Log a request and decide what it gets."""
        with self._lock:
            self.requests.append(request)
            fault = next((f for f in self._faults if f.matches(request)), None)
            if fault is not None:
                fault.times -= 1
        if fault is not None and fault.reply is not None:
            return fault.reply, None
        return self._respond(request), fault

    def _respond(self, request: Request) -> Reply:
        if request.path in self._routes:
            return self._routes[request.path](request)
        replies = (fallback(request) for fallback in self._fallbacks)
        return next((reply for reply in replies if reply is not None), Reply(b"no such page", 404))


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    request_queue_size = 128  # clients open several at once; one that finds no room waits a second
    hub: Hub

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up early is no news."""


class _Handler(BaseHTTPRequestHandler):
    timeout = 5

    def do_GET(self) -> None:
        self._serve(with_body=True)

    def do_HEAD(self) -> None:
        self._serve(with_body=False)

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self, *, with_body: bool) -> None:
        parts = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, unquote(parts.path), parse_qs(parts.query), headers)
        reply, fault = self.server.hub.answer(request)
        status, body, extra = _ranged(request, reply)
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **reply.headers, **extra}.items():
            self.send_header(name, str(value))
        if fault is not None and fault.dripping_header:
            self.flush_headers()
            for byte in b"X: " + 20 * b"x":
                self.wfile.write(bytes([byte]))
                time.sleep(0.1)
            self.wfile.write(b"\r\n")
        self.end_headers()
        if with_body:
            self._send(body, fault)

    def _send(self, body: bytes, fault: Fault | None) -> None:
        if fault is not None and fault.cut_after is not None:
            body = body[: fault.cut_after]
        size, seconds = (fault and fault.drip) or (len(body) or 1, 0.0)
        for start in range(0, len(body), size):
            self.wfile.write(body[start : start + size])
            time.sleep(seconds)


def _ranged(request: Request, reply: Reply) -> tuple[int, bytes, dict[str, str]]:
    """Cut a reply down to the range that was asked for, if it is still the same file."""
    asked = request.headers.get("range")
    condition = request.headers.get("if-range")
    if asked is None or not reply.ranges or reply.status != 200:
        return reply.status, reply.body, {}
    if reply.if_range and condition not in (None, reply.headers.get("ETag")):
        return reply.status, reply.body, {}
    start = int(asked.removeprefix("bytes=").partition("-")[0])
    if start >= len(reply.body):
        return 416, b"", {"Content-Range": f"bytes */{len(reply.body)}"}
    span = f"bytes {start}-{len(reply.body) - 1}/{len(reply.body)}"
    return 206, reply.body[start:], {"Content-Range": span}
