"""The HTTP client: what goes out with a request, and how much of an answer is taken."""

import pytest

from weights.download import http
from weights.download.http import Credential, HttpClient, HttpSettings, Remote
from weights.download.retry import RetryPolicy
from weights.serving.errors import ForbiddenAddressError, SourceUnavailableError, WeightsError


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
