"""A fleet of two replicas, over HTTP: it answers as one server does, and loses nothing."""

import os
import re
import signal
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import requests
from safetensors.torch import save_file

from serving.webhook import webhook
from tests.fleet.cases import CASES, comparable, names
from tests.fleet.running import (
    ASYNC,
    LONG,
    QUEUE,
    REPLICA,
    SMALL,
    Fleet,
    ask,
    fill,
    hold_both,
    start_long,
)
from tests.support.adapters import adapter
from tests.support.server import SERVER, WORKER, wait_for

# --- losing a replica; tests that use `running` do not wait for its successor


def test_another_replica_answers_when_a_server_dies(fleet, several) -> None:
    lose(fleet, several, WORKER)


def lose(fleet: Fleet, pool: ThreadPoolExecutor, command: bytes) -> None:
    """Lose a replica in a prediction: the caller gets the picture of the same seed all the same."""
    workers = fleet.pids(WORKER)
    inputs = {k: v for k, v in SMALL.items() if k != "seed"} | {"num_inference_steps": 50}
    with webhook() as (hook, payloads, _):
        body = {"input": inputs, "webhook": hook, "webhook_events_filter": ["logs"]}
        calls = [pool.submit(fleet.ask, "POST", "/predictions", json=body) for _ in range(2)]
        wait_for(lambda: len({payload["id"] for payload in payloads}) == 2)
        assert not any(call.done() for call in calls)  # so whichever is killed has a prediction
        fleet.kill(command)
        answers = [call.result().json() for call in calls]
    assert [answer["status"] for answer in answers] == ["succeeded"] * 2, answers
    for answer in answers:
        logs = [p["logs"] for p in payloads if p["id"] == answer["id"]]
        seeds = re.findall(r"seed: \d+", "".join([*logs, answer["logs"]]))
        assert len(set(seeds)) == 1
    wait_for(lambda: len(fleet.pids(WORKER) & workers) == 1)


# --- the same answers as one server's


@pytest.mark.parametrize("case", CASES)
def test_a_fleet_answers_as_one_server(running, server, case: str) -> None:
    method, path, options = CASES[case]
    one = comparable(server.server.request(method, path, **options))
    assert comparable(running.ask(method, path, **options)) == one


def test_webhooks_are_those_of_one_server(running, server) -> None:
    told = []
    for url in (server.server.url, running.url):
        with webhook() as (hook, payloads, _):
            body = {"input": SMALL, "webhook": hook}
            assert ask(url, "PUT", "/predictions/w", json=body, headers=ASYNC).status_code == 202
            wait_for(lambda: any(p["status"] == "succeeded" for p in payloads))
            # not always the last to arrive: each is sent by itself
            end = next(p for p in payloads if p["status"] == "succeeded")
            told.append((payloads[0], end["output"], names(end["metrics"])))
    assert told[0] == told[1]


# --- where a request goes


@pytest.fixture
def adapters(fleet) -> list[str]:
    """Paths of three adapters."""
    paths = [fleet.directory / f"{name}.safetensors" for name in "abc"]
    for seed, path in enumerate(paths):
        save_file(adapter(seed), path)
    return [str(path) for path in paths]


def test_a_request_goes_to_where_its_adapter_is(fleet, adapters, several) -> None:
    first, second, _ = adapters
    hold_both(fleet, several, first, second)
    for spelling in ("{}", "file://{}", " {} "):
        for path in (first, second):
            logs = fleet.predict(replicate_weights=spelling.format(path))["logs"]
            assert "weights merged" not in logs
            assert "from memory" in logs


def test_one_that_needs_no_merge_overtakes_one_that_does(fleet, adapters, several) -> None:
    first, second, third = adapters
    hold_both(fleet, several, first, second)
    with webhook() as (hook, long, _):
        told = {"webhook": hook, "webhook_events_filter": ["completed"]}
        fill(fleet, several, first, second, **told)
        waiting = []
        for path in (third, first, second):
            waiting.append(several.submit(fleet.predict, replicate_weights=path))
            time.sleep(0.2)  # so that they wait in this order
        assert [fleet.cancel(number) for number in range(2)] == [200, 200]
        cold, *warm = [prediction.result() for prediction in waiting]
        wait_for(lambda: len(long) == 2)
    assert not any("weights merged" in prediction["logs"] for prediction in long)
    assert "weights merged" in cold["logs"]
    assert not any("weights merged" in answer["logs"] for answer in warm)


def test_nobody_is_overtaken_for_ever(fleet, adapters, several) -> None:
    first, second, third = adapters
    hold_both(fleet, several, first, second)
    fill(fleet, several, first, second)
    ends: list[str] = []

    def generate(path: str) -> None:
        fleet.predict(replicate_weights=path)
        ends.append(path)

    waiting = [several.submit(generate, third)]
    time.sleep(0.2)  # so that the others come after it
    waiting += [several.submit(generate, path) for path in (first, second) * 6]
    time.sleep(0.5)
    assert [fleet.cancel(number) for number in range(2)] == [200, 200]
    for each in waiting:
        each.result()
    assert ends.index(third) < 10, ends  # without a bound it is the last


# --- the queue


def test_callers_wait_and_beyond_the_queue_hear_503(fleet, several) -> None:
    fill(fleet, several)
    assert fleet.health()["status"] == "BUSY"
    waiting = [start_long(fleet, several, number) for number in range(2, 2 + QUEUE)]
    assert [future.result().status_code for future in waiting] == [202] * QUEUE
    full = start_long(fleet, several, 99).result()
    assert full.status_code == 503
    assert int(full.headers["Retry-After"]) > 0
    assert "the queue is full" in full.json()["error"]
    assert [fleet.cancel(number) for number in range(2 + QUEUE)] == [200] * (2 + QUEUE)
    assert fleet.cancel(99) == 404
    fleet.predict()


def test_a_refusal_after_the_answer_is_told_by_the_webhook(fleet, several) -> None:
    fill(fleet, several)
    with webhook() as (hook, payloads, told):
        body = {"input": {**SMALL, "width": 5000}, "webhook": hook}
        assert fleet.ask("PUT", "/predictions/late", json=body, headers=ASYNC).status_code == 202
        assert [fleet.cancel(number) for number in range(2)] == [200, 200]
        assert told.wait(10)
        (payload,) = payloads
        assert (payload["id"], payload["status"]) == ("late", "failed")
        assert "5000 is greater than the maximum of 1440" in payload["error"]


# --- losing another replica


def test_another_replica_answers_when_an_actor_dies(fleet, several) -> None:
    lose(fleet, several, REPLICA)


def test_more_callers_than_replicas_are_all_answered(running, several) -> None:
    calls = [
        several.submit(running.predict, seed=seed % 2, num_inference_steps=1)
        for seed in range(QUEUE)
    ]
    outputs = [call.result()["output"] for call in calls]
    assert outputs == outputs[:2] * (QUEUE // 2)
    assert outputs[0] != outputs[1]


def test_a_synchronous_prediction_is_cancelled_as_by_one_server(running, server, several) -> None:
    answers = []
    for url in (server.server.url, running.url):
        path = f"/predictions/{uuid.uuid4().hex}"
        with webhook() as (hook, _, started):
            # not "start": one server loses a cancel that comes before the work has begun
            body = {"input": LONG, "webhook": hook, "webhook_events_filter": ["logs"]}
            call = several.submit(ask, url, "PUT", path, json=body)
            assert started.wait(10)
            assert ask(url, "POST", f"{path}/cancel").status_code == 200
            status, document, headers = comparable(call.result())
        assert document.pop("id") == path.split("/")[2]
        answers.append((status, document, headers))
    assert answers[0] == answers[1]
    assert answers[0][1]["status"] == "canceled"


def test_a_client_that_hangs_up_cancels_what_it_waits_for_alone(running, several) -> None:
    def hang_up(headers=None, **body: object) -> None:
        with pytest.raises(requests.ReadTimeout):
            running.ask("POST", "/predictions", json=body, headers=headers, timeout=0.5)

    with webhook() as (hook, payloads, _):
        calls = [several.submit(hang_up, input=LONG) for _ in range(4)]  # two or three have to wait
        told = {"webhook": hook, "webhook_events_filter": ["completed"]}
        calls.append(several.submit(hang_up, ASYNC, input=SMALL, **told))
        for call in calls:
            call.result()
        wait_for(lambda: payloads, 10)
    assert [payload["status"] for payload in payloads] == ["succeeded"]
    wait_for(lambda: running.health()["status"] == "READY", 5)
    running.predict()


# --- cancelling


def test_a_cancel_finds_a_prediction_wherever_it_is(fleet, several) -> None:
    """On either replica, or waiting; each ends as canceled, and its webhook says so."""
    with webhook() as (hook, payloads, _):
        names = [uuid.uuid4().hex for _ in range(3)]
        for name in names:
            body = {"input": LONG, "webhook": hook, "webhook_events_filter": ["completed"]}
            path = f"/predictions/{name}"
            assert fleet.ask("PUT", path, json=body, headers=ASYNC).status_code == 202
        again = fleet.ask("PUT", path, json=body, headers=ASYNC)
        assert (again.status_code, again.json()["status"]) == (202, "starting")
        assert [fleet.cancel(name) for name in reversed(names)] == [200, 200, 200]
        wait_for(lambda: len(payloads) == 3, 10)
        assert {payload["id"] for payload in payloads} == set(names)
        assert {payload["status"] for payload in payloads} == {"canceled"}


def test_a_cancel_at_any_moment_frees_the_replica(fleet, several) -> None:
    """Also while the prediction is on its way to the replica, or to the server's worker."""
    with webhook() as (hook, payloads, _):
        for number in range(2, 22):
            events = {"webhook": hook, "webhook_events_filter": ["completed"]}
            call = start_long(fleet, several, number, **events)
            time.sleep(0.008 + 0.002 * number)
            # 404: the front has not read it yet
            wait_for(lambda number=number: fleet.cancel(number) == 200, pause=0.001)
            call.result()
        wait_for(lambda: len(payloads) >= 20, 10)
        fill(fleet, several, webhook=hook, webhook_events_filter=["logs"])
        wait_for(lambda: {payload["id"] for payload in payloads} >= {"0", "1"}, 5)
        assert [fleet.cancel(number) for number in range(2)] == [200, 200]
    ended = [int(payload["id"]) for payload in payloads if payload["status"] == "canceled"]
    assert sorted(ended) == list(range(2, 22))  # each once


def test_a_webhook_that_is_refused_is_sent_again(fleet, several) -> None:
    """One that the front sends, of a prediction that no server has seen."""
    fill(fleet, several)
    with webhook(refusals=1) as (hook, payloads, told):
        body = {"input": LONG, "webhook": hook}
        assert fleet.ask("PUT", "/predictions/waits", json=body, headers=ASYNC).status_code == 202
        assert fleet.cancel("waits") == 200
        assert told.wait(10)
    assert [(payload["id"], payload["status"]) for payload in payloads] == [("waits", "canceled")]
    assert [fleet.cancel(number) for number in range(2)] == [200, 200]


def test_a_fleet_has_the_priority_of_its_command(fleet) -> None:
    for process in fleet.pids(WORKER) | fleet.pids(REPLICA):
        assert os.getpriority(os.PRIO_PROCESS, process) == os.getpriority(os.PRIO_PROCESS, 0)


# --- losing a prediction


def test_an_asynchronous_prediction_that_is_lost_ends_as_failed(fleet) -> None:
    with webhook() as (hook, payloads, _):
        for name in ("one", "two"):
            body = {"input": LONG, "webhook": hook, "webhook_events_filter": ["completed"]}
            path = f"/predictions/{name}"
            accepted = partial(fleet.ask, "PUT", path, json=body, headers=ASYNC)
            assert accepted().status_code == 202
            wait_for(lambda ask=accepted: ask().json()["status"] == "processing")
        fleet.kill(SERVER)
        wait_for(lambda: payloads)
        (lost,) = payloads
        assert lost["status"] == "failed"
        assert "was lost. Send the request again" in lost["error"]
        assert fleet.cancel(lost["id"]) == 404
        (other,) = {"one", "two"} - {lost["id"]}
        assert fleet.cancel(other) == 200
        wait_for(lambda: len(payloads) == 2)
        assert payloads[1]["status"] == "canceled"


# --- the command


def test_nothing_outlives_the_command(running) -> None:
    """Not even after kill -9; the last test, because it ends the fleet."""
    (command,) = running.pids(b"replicas\0--replicas")
    os.kill(command, signal.SIGKILL)
    wait_for(lambda: not running.pids(SERVER) | running.pids(WORKER) | running.pids(REPLICA), 20)
