"""A replica: Cog's server as a child process on loopback, and the way to it."""

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator
from contextvars import Context
from typing import Any, NoReturn
from urllib.parse import quote

import aiohttp
from ray import serve
from starlette.responses import Response

from replicas.exchange import Call, end_to_end
from serving.server import SERVE, Server
from serving.supervise import BROKEN

logger = logging.getLogger("ray.serve")

DOCUMENTS = ("/", "/openapi.json", "/health-check")
POLL_SECONDS = 0.02
CANCEL_SECONDS = 0.2  # for a cancel to have its effect
TIED_TO_THIS_PROCESS = ("setpriv", "--pdeathsig", "TERM")  # ends the child after a kill -9


class Replica:
    """One server, for one prediction at a time.

    When the server cannot predict any more, the process ends with it. Serve then starts another
    replica, and the front learns of the loss as of any other.

    Args:
        gpus: that Ray has given to it. A server that cannot use its card must not start: left to
            itself, it would serve the miniature on the CPU.
    """

    def __init__(self, gpus: int = 0) -> None:
        on_card = gpus and os.environ.get("FLUX_DEVICE") != "cpu"
        self._server = Server(
            {"FLUX_DEVICE": "cuda"} if on_card else None,
            on_log=print,
            command=(*TIED_TO_THIS_PROCESS, SERVE),
        )
        self._server.__enter__()
        self._front = serve.get_deployment_handle("Front")
        self._turn = asyncio.Lock()  # Serve sends the next call while a cancelled one still ends

    def __del__(self) -> None:
        self._server.stop()

    def check_health(self) -> None:
        """Called by Serve every second; script/serve ends when its server is broken."""
        if not self._server.running:
            self._end("its server has ended")

    async def predict(self, call: Call) -> AsyncIterator[Response | None]:
        """Yield None, so that the front hears of this replica, then the answer of the server.

        It ends when the prediction does, also that of an asynchronous call. If it is closed before,
        the prediction is cancelled, and it ends when the server is free again.
        """
        async with self._turn:
            await self._check_server()
            # In a context of its own, or its question to the front is cancelled with this call.
            sent = asyncio.create_task(self._forward(call), context=Context())
            try:
                yield None
                reply = await asyncio.shield(sent)  # a cancel must not race with what is being sent
                yield reply
                while reply.status_code == 202 and await self._status() == "BUSY":
                    await asyncio.sleep(POLL_SECONDS)
            except (asyncio.CancelledError, GeneratorExit):
                # Again, because Cog loses a cancel that comes very early; and not soon, because one
                # that comes late can end the next prediction (docs/reliability.md).
                cancel = f"/predictions/{quote(call.identifier, '')}/cancel"
                while not sent.done() or await self._status() == "BUSY":
                    known = (await self._ask("POST", cancel)).status_code != 404
                    await asyncio.sleep(CANCEL_SECONDS if known else POLL_SECONDS)
                raise

    async def describe(self) -> dict[str, Response]:
        """The documents that the server describes itself by, by their paths."""
        return {path: await self._ask("GET", path) for path in DOCUMENTS}

    async def _forward(self, call: Call) -> Response:
        """Send a call; again after a 409, which the server gives between two predictions."""
        if not await self._front.wants.remote(call.identifier, call.ticket):
            return Response()  # which nobody reads
        while (reply := await self._ask(*call.request)).status_code == 409:
            await asyncio.sleep(POLL_SECONDS)
        if b'"status":"failed"' in bytes(reply.body):
            await self._check_server()
        return reply

    async def _check_server(self) -> None:
        """End this replica if no prediction can succeed."""
        if (status := await self._status()) in BROKEN:
            self._end(f"its server is {status}")

    async def _status(self) -> str:
        return str(json.loads((await self._ask("GET", "/health-check")).body)["status"])

    async def _ask(self, method: str, path: str, headers: Any = None, body: Any = None) -> Response:
        """Send an HTTP request to the server; it ends this replica if there is no answer."""
        sent = {"headers": headers, "data": body, "timeout": aiohttp.ClientTimeout(total=None)}
        try:
            async with aiohttp.request(method, self._server.url + path, **sent) as answer:
                return Response(await answer.read(), answer.status, end_to_end(answer.headers))
        except aiohttp.ClientError as error:
            self._end(f"its server does not answer: {error}")

    def _end(self, reason: str) -> NoReturn:
        logger.error("This replica ends: %s", reason)
        self._server.kill()
        os._exit(1)
