"""The front: Cog's HTTP interface for all replicas together.

Every prediction goes through one place, so that a cancel finds it, a replica that is lost is
noticed, and the queue has one bound.

Tasks that may outlive the request that began them have a context of their own: when a client goes
away, Serve cancels all calls that were made in the context of its request.
"""

import asyncio
import json
import logging
import os
from contextvars import Context
from typing import Any

import aiohttp
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from replicas.exchange import Call, read_call

logger = logging.getLogger("ray.serve")

PATIENCE = 1.0  # seconds that an asynchronous request waits for the answer of a replica's server
RETRY_AFTER = "5"  # seconds
WEBHOOK_DELAYS = (0.0, 1.0, 5.0, 20.0)  # seconds before each try
LOST = "The replica that ran this prediction was lost. Send the request again."
FULL = "All replicas are busy and the queue is full. Try again later."
STARTING = "Setup has not finished yet. Wait until it has finished, or GET /health-check."
NOT_READY = JSONResponse({"error": STARTING, "status": "failed"}, 503)


class Prediction:
    """A call, from its arrival until a replica has dealt with it.

    reply: the answer to the caller. connected: the front has heard from its replica, or that is
    lost, or the prediction has ended. began: when a replica was told to send it to its server, in
    the loop's seconds. task: runs it; set right after it is made.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self.reply: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self.connected = asyncio.Event()
        self.began: float | None = None
        self.task: asyncio.Task[None]

    def answer(self, reply: Response) -> None:
        """Answer the caller, unless that was done."""
        if not self.reply.done():
            self.reply.set_result(reply)

    def state(self, status: str, **fields: Any) -> dict[str, Any]:
        """The prediction as a document in Cog's form."""
        now = asyncio.get_running_loop().time()
        took = {} if self.began is None else {"predict_time": now - self.began}
        return {"id": self.call.identifier, "logs": "", "metrics": took, "status": status, **fields}


class Front:
    """Answers HTTP requests; there must be one instance, so that it knows all predictions."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._replicas = replicas
        self._predictions: dict[str, Prediction] = {}
        self._description = asyncio.create_task(self._describe())

    async def __call__(self, request: Request) -> Response:
        """Answer an HTTP request."""
        path = request.url.path
        match request.method, path.removeprefix("/").split("/"):
            case ("POST", ["predictions"]) | ("PUT", ["predictions", _]):
                return await self._predict(request)
            case "POST", ["predictions", identifier, "cancel"]:
                return self._cancel(identifier)
            case "GET" | "HEAD", ["health-check"]:
                return await self._health()
            case "GET" | "HEAD", [""] | ["openapi.json"]:
                documents = await self._described()
                return documents[path] if documents else NOT_READY
            case _, ["predictions"] | ["predictions", _, "cancel"]:
                return Response(status_code=405, headers={"allow": "POST"})
            case _, ["predictions", _]:
                return Response(status_code=405, headers={"allow": "PUT"})
            case _, [""] | ["openapi.json"] | ["health-check"]:
                return Response(status_code=405, headers={"allow": "GET,HEAD"})
        return Response(status_code=404)

    async def _predict(self, request: Request) -> Response:
        if not await self._described():
            return NOT_READY
        received = request.method, request.url.path, dict(request.headers), await request.body()
        call = await asyncio.to_thread(read_call, *received)
        if known := self._predictions.get(call.identifier):  # sent once more: how it stands
            status = "starting" if known.began is None else "processing"
            return JSONResponse(known.state(status, input=known.call.inputs, metrics={}), 202)
        prediction = self._predictions[call.identifier] = Prediction(call)
        prediction.task = asyncio.create_task(self._follow(prediction), context=Context())
        try:
            await asyncio.wait({prediction.reply}, timeout=PATIENCE if call.asynchronous else None)
        except asyncio.CancelledError:  # the caller has gone away
            if not call.asynchronous:
                prediction.task.cancel()
            raise
        prediction.answer(JSONResponse({"id": call.identifier, "status": "starting"}, 202))
        return prediction.reply.result()

    async def _follow(self, prediction: Prediction) -> None:
        """Have a prediction done; tell the caller of an end that no server tells of."""
        status, end, tell = 503, prediction.state("failed", error=LOST), True  # tell: the webhook
        try:
            await self._run(prediction)
            return
        except asyncio.CancelledError:
            status, end, tell = 200, prediction.state("canceled"), prediction.began is None
        except BackPressureError:
            end["error"] = FULL
            tell = prediction.reply.done()
        except HTTPException as error:  # refused by the server, after the caller was told 202
            end["error"] = f"HTTP {error}"
        except Exception as error:  # a replica is lost, or what it has raised
            logger.error("Prediction %s failed: %s", prediction.call.identifier, error)
        finally:
            del self._predictions[prediction.call.identifier]
            prediction.connected.set()
        headers = {"retry-after": RETRY_AFTER} if status == 503 else {}
        prediction.answer(JSONResponse(end, status, headers))
        if tell and prediction.call.webhook:
            await _send_webhook(prediction.call, end)

    async def _run(self, prediction: Prediction) -> None:
        """Send a prediction to a replica; to another one, once, if that is lost meanwhile.

        An asynchronous one that a server has accepted is not sent again: its webhooks have begun.
        """
        call = prediction.call
        method = self._replicas.options(stream=True, multiplexed_model_id=call.adapters).predict
        for last in (False, True):
            answered = False
            stream = method.remote(call)
            try:
                async for reply in stream:
                    prediction.connected.set()
                    if reply is None:
                        continue
                    answered = True
                    if prediction.reply.done() and reply.status_code != 202:
                        raise HTTPException(reply.status_code, bytes(reply.body).decode())
                    prediction.answer(reply)
                return
            except asyncio.CancelledError:
                stream.cancel()
                raise
            except RayActorError:
                if answered and not call.asynchronous:
                    return
                if answered or last:
                    raise
                logger.warning("Prediction %s: a replica was lost; trying another", call.identifier)
                prediction.connected.set()
                prediction.connected = asyncio.Event()
                prediction.began = None

    async def wants(self, identifier: str, ticket: str) -> bool:
        """Whether a replica shall send a call to its server; it asks because Serve loses cancels.

        One that comes while Serve sends the call to a replica may be lost. So the answer waits
        until the front hears of that replica; a cancel that comes later reaches it. If the answer
        is yes, the server tells the webhook of the end; if no, the front does.
        """
        prediction = self._predictions.get(identifier)
        if prediction and prediction.call.ticket == ticket:
            heard = prediction.connected
            await heard.wait()
            if self._predictions.get(identifier) is prediction and heard is prediction.connected:
                prediction.began = asyncio.get_running_loop().time()
                return True
        return False

    def _cancel(self, identifier: str) -> Response:
        if prediction := self._predictions.get(identifier):
            # Soon, because a task that is cancelled before its first step does not take any.
            asyncio.get_running_loop().call_soon(prediction.task.cancel)
        return JSONResponse({}, 200 if prediction else 404)

    async def _health(self) -> Response:
        documents = await self._described()
        if not documents or not (count := await asyncio.to_thread(_running_replicas)):
            return JSONResponse({"status": "STARTING", "replicas": 0})
        own = {"status": "BUSY" if len(self._predictions) >= count else "READY", "replicas": count}
        return JSONResponse({**json.loads(documents["/health-check"].body), **own})

    async def _described(self) -> dict[str, Response] | None:
        """What the first replica's server said of itself; None if none is ready within a second."""
        await asyncio.wait({self._description}, timeout=PATIENCE)
        return self._description.result() if self._description.done() else None

    async def _describe(self) -> dict[str, Response]:
        while True:
            try:
                return await self._replicas.describe.remote()
            except RayActorError:
                continue  # another one starts


def _running_replicas() -> int:
    application = serve.status().applications[serve.get_replica_context().app_name]
    return application.deployments["Replica"].replica_states.get("RUNNING", 0)


async def _send_webhook(call: Call, state: dict[str, Any]) -> None:
    """Tell of the end of a prediction as Cog's server would; a few tries."""
    token = os.environ.get("WEBHOOK_AUTH_TOKEN")
    headers = {"authorization": f"Bearer {token}"} if token else {}
    sent = {"json": state, "headers": headers, "raise_for_status": True}
    for delay in WEBHOOK_DELAYS:
        await asyncio.sleep(delay)
        try:
            async with aiohttp.request("POST", call.webhook, **sent):
                return
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            # not the message: it has the address, which may be secret
            problem = f"HTTP {error.status}" if hasattr(error, "status") else type(error).__name__
    logger.error("Prediction %s: its webhook was not delivered: %s", call.identifier, problem)
