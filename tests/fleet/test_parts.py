"""The fleet's parts by themselves, where what they are for is rare in a whole one.

They run in a process of their own, because Ray is in another environment than the tests.
"""

import json
from typing import Any

import pytest

from tests.fleet.running import run

# --- a replica

REPLICA = """
import asyncio, json, time, types
import replicas.replica
from replicas.exchange import read_call

async def synchronous(replica, stream):
    sent = asyncio.create_task(follow(stream))
    while (await health(replica))["status"] != "BUSY":
        await asyncio.sleep(0.01)
    sent.cancel()

asynchronous = synchronous

async def early(replica, stream):
    sent = asyncio.create_task(follow(stream))
    await asyncio.sleep(0.1)  # the server has it, and says that it is free
    sent.cancel()

async def closed(replica, stream):
    await anext(stream)  # the answer
    await stream.aclose()

async def unwanted(replica, stream):
    await follow(stream)

async def end(name):
    async def wants(identifier, ticket):
        return name != "unwanted"

    front = types.SimpleNamespace(wants=types.SimpleNamespace(remote=wants))
    replicas.replica.serve = types.SimpleNamespace(get_deployment_handle=lambda _: front)
    replica = replicas.replica.Replica()
    headers = {} if name == "synchronous" else {"prefer": "respond-async"}
    call = read_call("PUT", "/predictions/one", headers, b"{}")
    stream = replica.predict(call)
    await anext(stream)  # it is about to be sent
    await globals()[name](replica, stream)
    start = time.monotonic()
    following = replica.predict(call)
    await anext(following)  # it is about to be sent
    waited = time.monotonic() - start
    found = await health(replica)
    await following.aclose()
    replica.__del__()  # as Serve ends it
    return name, {**found, "waited": waited}

async def follow(stream):
    async for _ in stream:
        pass

async def health(replica):
    return json.loads((await replica.describe())["/health-check"].body)

async def main():
    replicas.replica.SERVE = "tests/fleet/forgetful.py"
    print(json.dumps(dict(await asyncio.gather(*map(end, NAMES)))))

asyncio.run(main())
"""
CANCELLED = ["synchronous", "asynchronous", "early"]


@pytest.fixture(scope="module")
def ends() -> dict[str, dict[str, Any]]:
    """What is found after each way that a call to a replica can end, all at the same time."""
    names = [*CANCELLED, "closed", "unwanted"]
    found: dict[str, dict[str, Any]] = json.loads(run(REPLICA.replace("NAMES", str(names))))
    return found


@pytest.mark.parametrize("name", [*CANCELLED, "closed"])
def test_a_replica_cancels_until_its_server_is_free_for_the_next(ends, name: str) -> None:
    assert (ends[name]["status"], ends[name]["cancels"]) == ("READY", 2)


@pytest.mark.parametrize("name", CANCELLED)
def test_a_cancel_has_time_to_end_its_prediction_and_not_the_next(ends, name: str) -> None:
    assert ends[name]["waited"] >= 0.4  # two of 0.2 s


def test_a_replica_does_not_send_what_the_front_does_not_want(ends) -> None:
    assert (ends["unwanted"]["status"], ends["unwanted"]["cancels"]) == ("READY", 0)


STARTED_ON = """
import json, os, types
import replicas.replica

class Server:
    def __init__(self, environment=None, **_):
        started.append((environment or {}).get("FLUX_DEVICE"))
    __enter__ = stop = lambda self: None

started = []
replicas.replica.Server = Server
replicas.replica.serve = types.SimpleNamespace(get_deployment_handle=lambda _: None)
for gpus, device in ((0, None), (1, None), (1, "cuda:3"), (1, "cpu")):
    os.environ.pop("FLUX_DEVICE", None)
    os.environ |= {"FLUX_DEVICE": device} if device else {}
    replicas.replica.Replica(gpus)
print(json.dumps(started))
"""


def test_a_replica_with_a_card_does_not_fall_back_to_the_cpu() -> None:
    """Ray shows it one card, which is the first that it sees; an operator may still say cpu."""
    assert json.loads(run(STARTED_ON)) == [None, "cuda", "cuda", None]


# --- the front

LOST_CANCEL = """
import asyncio, json, types
from starlette.requests import Request
from replicas.front import Front

class Stream:
    '''Serve's answer to a call: a cancel of it is lost, because the call is being sent.'''
    def __init__(self):
        self.heard = asyncio.Event()
    def __aiter__(self):
        return self
    async def __anext__(self):
        await self.heard.wait()
        self.heard.clear()
    def cancel(self):
        pass

class Replicas:
    def __init__(self):
        self.calls, self.streams = [], []
        self.predict = types.SimpleNamespace(remote=self.send)
        self.describe = types.SimpleNamespace(remote=self.document)
    def options(self, **_):
        return self
    def send(self, call):
        self.calls.append(call)
        self.streams.append(Stream())
        return self.streams[-1]
    async def document(self):
        return {"/": None}

async def main():
    replicas = Replicas()
    front = Front(replicas)

    async def ask(method, path):
        async def receive():
            return {"type": "http.request", "body": b"{}"}
        headers = [(b"prefer", b"respond-async")]
        scope = {"type": "http", "method": method, "path": path, "headers": headers}
        scope |= {"query_string": b"", "scheme": "http", "server": ("127.0.0.1", 80)}
        return (await front(Request(scope, receive))).status_code

    sent = asyncio.create_task(ask("PUT", "/predictions/one"))
    while not replicas.calls:
        await asyncio.sleep(0.01)
    early = asyncio.create_task(front.wants("one", replicas.calls[0].ticket))
    await asyncio.sleep(0.1)
    print(early.done(), await ask("POST", "/predictions/one/cancel"), await early, await sent)
    again = asyncio.create_task(ask("PUT", "/predictions/one"))
    while len(replicas.calls) < 2:
        await asyncio.sleep(0.01)
    print(await front.wants("one", replicas.calls[0].ticket))
    replicas.streams[1].heard.set()
    print(await front.wants("one", replicas.calls[1].ticket))

asyncio.run(main())
"""


def test_a_replica_hears_of_a_cancel_that_serve_loses() -> None:
    """Also when there is another prediction of the same id by then."""
    first, *after = run(LOST_CANCEL).splitlines()
    assert first == "False 200 False 200"  # it waits, and is then told
    assert after == ["False", "True"]


# --- the router

ROUTER = """
import asyncio
from ray.serve._private.common import (
    DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
)
from ray.serve.request_router import PendingRequest
from replicas.router import AdapterRouter

DEPLOYMENT = DeploymentID("Replica", "flux")

class Replica:
    max_ongoing_requests = 1
    replica_id = ReplicaID("one", DEPLOYMENT)
    ongoing = 1
    async def get_queue_len(self, *, deadline_s):
        return self.ongoing

def request(name):
    return PendingRequest([], {}, RequestMetadata(name, name, is_streaming=True))

async def main():
    router = AdapterRouter(
        DEPLOYMENT, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True,
        initial_backoff_s=0.01, max_backoff_s=0.1,
    )
    replica = Replica()
    router.update_replicas([replica])
    await asyncio.sleep(0.1)  # it is asked, and says that it has a request
    router.on_send_request(replica.replica_id)
    router.on_new_queue_len_info(replica.replica_id, 1)
    router.on_request_routed(request("zero"), replica.replica_id, None)
    waits = asyncio.create_task(router._choose_replica_for_request(request("one")))
    await asyncio.sleep(0.3)
    before = waits.done()
    replica.ongoing = 0
    router.on_request_completed(replica.replica_id, "zero")  # and the count remains
    await asyncio.wait_for(waits, 5)
    print(before, "routed")

asyncio.run(main())
"""


def test_a_free_replica_that_is_counted_as_busy_gets_the_next_request() -> None:
    """Serve itself would believe the count for ten seconds."""
    assert run(ROUTER) == "False routed"
