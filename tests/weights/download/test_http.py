"""The HTTP client: what goes out with a request, and how much of an answer is taken."""

import json

import pytest

from tests.support.hub import Reply
from weights.download import http
from weights.download.http import HttpClient, HttpSettings
from weights.download.remote import Credential, Remote
from weights.download.retry import RetryPolicy
from weights.serving.cancel import Cancelled
from weights.serving.errors import (
    ForbiddenAddressError,
    NotFoundError,
    SourceUnavailableError,
    WeightsError,
)


@pytest.fixture
def client():
    client = HttpClient(HttpSettings(allow_private_hosts=True))
    yield client
    client.close()


def test_redirect_is_followed_and_the_token_stays_behind(hub, client):
    hub.add_file("/stored", b"x")
    url = hub.add_redirect("/x", hub.storage_url + "/stored")
    remote = Remote(url, "x", Credential("TOKEN", hub.url, "mine"))
    with client.open(remote) as response:
        assert response.status_code == 200
    assert [request.token for request in hub.requests] == ["mine", None]


def test_endless_redirects_end(hub, client):
    url = hub.add_redirect("/x", hub.url + "/x")
    with (
        pytest.raises(WeightsError, match="more than 10 redirects"),
        client.open(Remote(url, "x")),
    ):
        pass
    assert len(hub.requests) == 11


def test_the_body_of_a_redirect_is_not_read(hub):
    """It may be endless, or swell when it is decompressed."""
    target = hub.add_file("/y", b"y")
    reply = Reply(b"x" * 20, 302, {"Location": target, "Content-Encoding": "gzip"})
    hub.route("/x", lambda _: reply)
    hub.drip("/x", size=1, seconds=0.1)
    client = HttpClient(HttpSettings(allow_private_hosts=True, answer_timeout=1))
    with client.open(Remote(hub.url + "/x", "x")) as response:
        assert response.raw.read() == b"y"
    client.close()


def test_a_cookie_of_a_redirect_goes_to_its_target(hub, client):
    """Links for sharing without a login may need it."""
    target = hub.add_file("/y", b"y")
    cookie = {"Location": target, "Set-Cookie": "session=mine; Path=/"}
    hub.route("/x", lambda _: Reply(status=302, headers=cookie))
    with client.open(Remote(hub.url + "/x", "x")):
        pass
    assert [request.headers.get("cookie") for request in hub.requests] == [None, "session=mine"]


@pytest.fixture(params=["header", "error", "JSON"])
def dripping(request, hub):
    """A call whose answer takes two seconds, though no pause in it is long."""
    if request.param == "error":
        hub.route("/x", lambda _: Reply(b"{" + b" " * 20, 404))
    else:
        hub.add_file("/x", b"{" + b" " * 20)
    if request.param == "header":
        hub.drip_header("/x")
    else:
        hub.drip("/x", size=1, seconds=0.1)
    remote = Remote(hub.url + "/x", "the file")
    if request.param == "JSON":
        return lambda client, retry: client.get_json(remote, retry)
    return lambda client, retry: client.probe(remote, retry)


def test_an_answer_that_drips_is_given_up(hub, dripping):
    client = HttpClient(HttpSettings(allow_private_hosts=True, answer_timeout=0.3))
    with pytest.raises(SourceUnavailableError, match="the file: the server did not answer within"):
        dripping(client, RetryPolicy(5))
    client.close()
    assert len(hub.requests) == 1  # not again: each try takes as long


def test_a_cancel_reaches_an_answer_that_drips(hub, client, dripping):
    def check_cancelled():
        if hub.requests:
            raise Cancelled

    with pytest.raises(Cancelled):
        dripping(client, RetryPolicy(1, check_cancelled=check_cancelled))


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("Cannot GET /x?X-Amz-Signature=geheim", "HTTP 404: Cannot GET /x)"),
        ("https://me:geheim@host/x?sig=geheim is gone", "HTTP 404: https://host/x is gone)"),
        ("see https://me@home:geheim@host/x", "HTTP 404: see https://host/x)"),
        ("Did you mean x?", "HTTP 404: Did you mean x?)"),
    ],
)
def test_what_a_server_says_is_shown_without_secrets(hub, client, said, shown):
    hub.fail("/x", 404, json.dumps({"message": said}).encode())
    with pytest.raises(NotFoundError) as caught:
        client.probe(Remote(hub.url + "/x", "x"), RetryPolicy(1))
    assert shown in str(caught.value)


def test_cookies_of_one_request_do_not_go_out_with_the_next(hub, client):
    url = hub.add_file("/x", b"x", headers={"Set-Cookie": "session=mine; Path=/"})
    for _ in range(2):
        client.probe(Remote(url, "x"), RetryPolicy())
    assert [request.headers.get("cookie") for request in hub.requests] == [None, None]


def test_a_proxy_of_the_environment_is_not_asked(hub, monkeypatch):
    """It would connect to any address on our behalf."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, hub.url)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    client = HttpClient(HttpSettings())
    with pytest.raises(ForbiddenAddressError), client.open(Remote("http://10.0.0.1/x", "x")):
        pass
    client.close()
    assert hub.requests == []


def test_of_a_json_answer_no_more_than_the_limit_is_read(hub, client, monkeypatch):
    monkeypatch.setattr(http, "MAX_JSON_BYTES", 1000)
    for size, fits in ((900, True), (5000, False)):
        answer = Remote(hub.add_file("/x", b'"' + b"x" * size + b'"'), "x")
        if fits:
            assert client.get_json(answer, RetryPolicy(1)) == "x" * size
            continue
        with pytest.raises(SourceUnavailableError, match="other than JSON"):
            client.get_json(answer, RetryPolicy(1))
