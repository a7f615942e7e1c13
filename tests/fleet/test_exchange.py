"""What the fleet reads in a request: the adapters that decide where it goes, and its seed."""

import base64
import json
from typing import Any

import pytest

from replicas.exchange import Call, adapters_of, read_call

HUB = "https://huggingface.co/someone/style"


def read(body: Any, path: str = "/predictions", **headers: str) -> Call:
    method = "PUT" if path.count("/") > 1 else "POST"
    return read_call(method, path, headers, json.dumps(body).encode())


def sent(call: Call) -> Any:
    return json.loads(call.request[-1])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (HUB, "huggingface.co/someone/style"),
        (HUB, "hf:someone/style"),
        ("owner/name", " https://replicate.com/owner/name "),
        ("civitai.com/models/12?modelVersionId=34", "urn:air:flux1:lora:civitai:12@34"),
    ],
)
def test_spellings_of_one_adapter_are_one(one: str, other: str) -> None:
    assert adapters_of({"replicate_weights": one}) == adapters_of({"extra_lora": other})
    assert adapters_of({"replicate_weights": one}) != adapters_of({"replicate_weights": "a/b"})


def test_a_set_of_adapters_has_no_order() -> None:
    pair = adapters_of({"replicate_weights": "a/b", "extra_lora": "c/d"})
    assert pair == adapters_of({"replicate_weights": "c/d", "extra_lora": "a/b"})
    assert pair not in (adapters_of({"extra_lora": "a/b"}), adapters_of({"extra_lora": "c/d"}))


@pytest.mark.parametrize(
    "inputs", [{}, {"replicate_weights": " "}, {"extra_lora": "not one"}, {"extra_lora": 5}]
)
def test_without_an_adapter_a_request_goes_anywhere(inputs: dict[str, Any]) -> None:
    assert adapters_of(inputs) == ""


def test_the_default_adapter_is_one_of_the_adapters(monkeypatch) -> None:
    named = adapters_of({"replicate_weights": "a/b"})
    monkeypatch.setenv("COG_WEIGHTS", "a/b")
    assert adapters_of({}) == adapters_of({"replicate_weights": " "}) == named
    assert adapters_of({"replicate_weights": "c/d"}) != named


def test_secrets_of_links_do_not_travel() -> None:
    uri = "data:application/octet-stream;base64," + base64.b64encode(b"adapter").decode()
    for link in ("https://host/a.safetensors?signature=secret", uri):
        named = adapters_of({"replicate_weights": link})
        assert len(named) == 16
        assert set(named) <= set("0123456789abcdef")


@pytest.mark.parametrize("seed", [{}, {"seed": -1}])
def test_a_seed_is_chosen_before_the_first_try(seed: dict[str, int]) -> None:
    """As often as another replica has to generate the picture, it is the same one."""
    call = read({"input": {"prompt": "x", **seed}})
    assert 0 <= sent(call)["input"]["seed"] < 2**32
    assert call.inputs == {"prompt": "x", **seed}


@pytest.mark.parametrize("seed", [0, 7, 2.0, None, "7", -0.5])
def test_a_seed_that_is_given_is_left_to_the_server(seed: Any) -> None:
    assert sent(read({"input": {"seed": seed}}))["input"] == {"seed": seed}


def test_an_asynchronous_call_is_not_tried_again_and_keeps_its_inputs() -> None:
    call = read({"input": {"prompt": "x"}}, prefer="respond-async")
    assert sent(call)["input"] == {"prompt": "x"}


@pytest.mark.parametrize("prefer", ["respond-async, wait=5", "wait=5", "not-respond-async", ""])
def test_a_call_is_synchronous_where_one_server_takes_it_for_that(prefer: str) -> None:
    """coglet 0.23 compares the whole header."""
    assert not read({}, prefer=prefer).asynchronous
    assert read({}, prefer="respond-async").asynchronous


def test_an_identifier_that_is_null_is_none() -> None:
    first, second = read({"id": None}), read({"id": None})
    assert first.identifier != second.identifier
    assert sent(first)["id"] == first.identifier


def test_identifiers() -> None:
    assert read({"id": "mine"}).identifier == "mine"
    call = read({})
    assert sent(call)["id"] == call.identifier
    put = read({"id": "other"}, "/predictions/mine")
    assert (put.identifier, sent(put)) == ("mine", {"id": "other"})


@pytest.mark.parametrize("content", [b"{", b"[1]", b"", b"\xff", b'{"input": {"seed": NaN}}'])
def test_what_is_no_json_object_is_passed_on(content: bytes) -> None:
    call = read_call("POST", "/predictions", {"x-mine": "1", "Host": "h"}, content)
    assert call.request == ("POST", "/predictions", {"x-mine": "1"}, content)


def test_a_webhook_is_told_of_the_end_unless_it_wants_other_events() -> None:
    hook = {"webhook": "http://host/"}
    assert read({**hook}).webhook == "http://host/"
    assert read({**hook, "webhook_events_filter": ["start", "completed"]}).webhook
    assert not read({**hook, "webhook_events_filter": ["start"]}).webhook
    assert read({**hook, "webhook_events_filter": 5}).webhook  # which the server refuses
