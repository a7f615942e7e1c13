"""Downloads over connections that break, stall, lie and ask to wait."""

import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace

import pytest

from tests.support.services import sha256
from weights.download.http import HttpClient, HttpSettings
from weights.download.remote import Remote
from weights.download.retry import RetryPolicy
from weights.download.transfer import Expected, LogProgress, download
from weights.serving.errors import (
    InvalidFileError,
    NotFoundError,
    SourceUnavailableError,
    WeightsError,
)

UNKNOWN = Expected()
CONTENT = bytes(range(256)) * 4000


@pytest.fixture
def fetch(tmp_path):
    """Downloads a URL to a file, with short waits; returns the file."""
    clients = []

    def run(url, *, expected=UNKNOWN, attempts=3, check=lambda: None, **settings):
        settings = {"allow_private_hosts": True, "read_timeout": 0.3, **settings}
        client = HttpClient(HttpSettings(**settings))
        clients.append(client)
        target = tmp_path / "file"
        download(
            client,
            Remote(url, "the file"),
            target,
            expected=expected,
            retry=RetryPolicy(attempts, backoff=0.01, check_cancelled=check),
            on_progress=LogProgress("the file", every=0.0),
        )
        return target

    yield run
    for client in clients:
        client.close()


def ranges(hub):
    return [request.headers.get("range") for request in hub.requests]


def test_whole_file_and_its_progress_in_the_log(hub, fetch, caplog):
    caplog.set_level("INFO")
    assert fetch(hub.add_file("/x", CONTENT)).read_bytes() == CONTENT
    assert "the file: 1.0 of 1.0 MB" in caplog.text


def test_progress_is_in_the_log_now_and_then(monkeypatch, caplog):
    caplog.set_level("INFO")
    now = iter(range(100))  # seconds
    clock = SimpleNamespace(monotonic=lambda: next(now))
    monkeypatch.setattr("weights.download.transfer.time", clock)
    log = LogProgress("the file", every=5.0)
    for done in range(20):
        log(done * 1_000_000, None)
    assert 2 <= len(caplog.messages) <= 4


def test_broken_connection_goes_on_where_it_stopped(hub, fetch):
    url = hub.add_file("/x", CONTENT)
    hub.cut("/x", after=600_000)
    assert fetch(url).read_bytes() == CONTENT
    assert ranges(hub) == [None, "bytes=600000-"]


def test_many_breaks_are_survived_as_long_as_bytes_come(hub, fetch):
    url = hub.add_file("/x", CONTENT)
    hub.cut("/x", after=100_000, times=10)
    assert fetch(url, attempts=2).read_bytes() == CONTENT


def test_server_without_ranges_starts_over(hub, fetch):
    url = hub.add_file("/x", CONTENT, ranges=False)
    hub.cut("/x", after=600_000)
    assert fetch(url).read_bytes() == CONTENT


def test_file_whose_validator_is_weak_starts_over(hub, fetch):
    url = hub.add_file("/x", CONTENT, headers={"ETag": 'W/"a"'})
    hub.cut("/x", after=600_000)
    assert fetch(url).read_bytes() == CONTENT
    assert ranges(hub) == [None, None]


def test_another_range_than_asked_for_is_not_put_behind_the_part(hub, fetch):
    url = hub.add_file("/x", CONTENT)
    hub.cut("/x", after=600_000)
    hub.fail("/x", 206, CONTENT, {"Content-Range": f"bytes 0-{len(CONTENT) - 1}/{len(CONTENT)}"})
    assert fetch(url).read_bytes() == CONTENT


def test_breaks_without_progress_end(hub, fetch):
    url = hub.add_file("/x", CONTENT, ranges=False)
    hub.cut("/x", after=600_000, times=99)
    with pytest.raises(SourceUnavailableError, match="the file: the connection"):
        fetch(url)
    assert len(hub.requests) == 3


@pytest.mark.parametrize("if_range", [True, False])
def test_file_replaced_between_two_tries_is_fetched_anew(hub, fetch, if_range):
    url = hub.add_file("/x", CONTENT)
    hub.cut("/x", after=600_000)
    replaced = CONTENT[::-1]

    def replace_after_the_first():
        if len(hub.requests) == 1:
            hub.add_file("/x", replaced, if_range=if_range)

    assert fetch(url, check=replace_after_the_first).read_bytes() == replaced


def test_part_of_an_earlier_run_is_continued_if_the_file_is_the_same(hub, fetch, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT[:1000])
    url = hub.add_file("/x", CONTENT)
    assert fetch(url, expected=Expected(sha256=sha256(CONTENT))).read_bytes() == CONTENT
    assert ranges(hub) == ["bytes=1000-"]


def test_complete_part_of_an_earlier_run_is_not_fetched_again(hub, fetch, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT)
    expected = Expected(size=len(CONTENT), sha256=sha256(CONTENT))
    assert fetch(hub.add_file("/x", CONTENT), expected=expected).read_bytes() == CONTENT
    assert hub.requests == []


def test_part_of_unknown_origin_is_not_continued(hub, fetch, tmp_path):
    (tmp_path / "file.part").write_bytes(b"other bytes")
    assert fetch(hub.add_file("/x", CONTENT)).read_bytes() == CONTENT
    assert ranges(hub) == [None]


def test_a_part_of_another_version_is_not_kept(hub, fetch, tmp_path):
    """The one that was expected may come back, and would be put behind it."""
    url = hub.add_file("/x", CONTENT)
    hub.cut("/x", after=1000, times=9)
    with pytest.raises(SourceUnavailableError):
        fetch(url, expected=Expected(validator='"another"'), attempts=1)
    assert list(tmp_path.iterdir()) == []


def test_part_longer_than_the_file_starts_over(hub, fetch, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT + b"more")
    url = hub.add_file("/x", CONTENT)
    assert fetch(url, expected=Expected(sha256=sha256(CONTENT))).read_bytes() == CONTENT


@pytest.mark.parametrize("status", [429, 500, 502, 503, 521])
def test_busy_server_is_asked_again(hub, fetch, status):
    url = hub.add_file("/x", CONTENT)
    hub.fail("/x", status, times=2)
    assert fetch(url).read_bytes() == CONTENT


def test_retry_after_is_honoured(hub, fetch):
    url = hub.add_file("/x", CONTENT)
    hub.fail("/x", 429, headers={"Retry-After": "1"})
    began = time.monotonic()
    fetch(url)
    assert time.monotonic() - began > 0.9


@pytest.mark.parametrize(
    "later",
    ["3600", format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)],
    ids=["seconds", "date"],  # the same names in all processes
)
def test_unreasonable_retry_after_is_given_up(hub, fetch, later):
    url = hub.add_file("/x", CONTENT)
    hub.fail("/x", 503, headers={"Retry-After": later}, times=9)
    with pytest.raises(SourceUnavailableError, match="HTTP 503"):
        fetch(url)
    assert len(hub.requests) == 1


def test_a_short_retry_after_does_not_shorten_the_wait():
    tries = []

    def busy():
        tries.append(1)
        raise SourceUnavailableError("busy", retry_after=0.001)

    with pytest.raises(SourceUnavailableError):
        RetryPolicy(backoff=60.0).run(busy)  # longer than it waits for
    assert len(tries) == 1


def test_missing_file_is_asked_for_once(hub, fetch):
    with pytest.raises(NotFoundError, match="the file: not found"):
        fetch(hub.url + "/missing")
    assert len(hub.requests) == 1


def test_wrong_hash_leaves_nothing(hub, fetch, tmp_path):
    url = hub.add_file("/x", CONTENT)
    with pytest.raises(InvalidFileError, match="announces abc"):
        fetch(url, expected=Expected(sha256="abc"))
    assert list(tmp_path.iterdir()) == []


def test_wrong_size_leaves_nothing(hub, fetch, tmp_path):
    url = hub.add_file("/x", CONTENT)
    with pytest.raises(InvalidFileError, match="announces 5"):
        fetch(url, expected=Expected(size=5))
    assert list(tmp_path.iterdir()) == []


def test_file_beyond_the_limit_is_not_fetched(hub, fetch, tmp_path):
    url = hub.add_file("/x", CONTENT)
    with pytest.raises(InvalidFileError, match="more than the"):
        fetch(url, max_bytes=1000)
    assert list(tmp_path.iterdir()) == []


def test_file_of_untold_size_is_fetched_up_to_the_limit(hub, fetch):
    url = hub.add_file("/x", CONTENT, headers={"Content-Length": ""})
    assert fetch(url, max_bytes=len(CONTENT)).read_bytes() == CONTENT
    with pytest.raises(InvalidFileError, match="more than the"):
        fetch(url, max_bytes=len(CONTENT) - 1)


def test_unfinished_download_does_not_take_the_name_of_the_file(hub, fetch, tmp_path):
    url = hub.add_file("/x", CONTENT)
    hub.cut("/x", after=1000, times=9)
    with pytest.raises(SourceUnavailableError):
        fetch(url, attempts=1)
    assert [path.name for path in tmp_path.iterdir()] == ["file.part"]


def test_silent_server_is_given_up(hub, fetch):
    url = hub.add_file("/x", CONTENT)
    hub.drip("/x", size=1000, seconds=0.6)
    with pytest.raises(SourceUnavailableError, match="the connection failed"):
        fetch(url, attempts=1)
    hub.heal()


@pytest.mark.parametrize("before", [0, 900_000])
def test_dripping_server_is_given_up(hub, fetch, tmp_path, before):
    """However much came in an earlier run."""
    (tmp_path / "file.part").write_bytes(CONTENT[:before])
    url, expected = hub.add_file("/x", CONTENT), Expected(sha256=sha256(CONTENT))
    hub.drip("/x", size=1000, seconds=0.02)
    with pytest.raises(WeightsError, match="less than 100000 bytes per second"):
        fetch(url, expected=expected, min_rate=1e5, min_rate_seconds=0.1)


def test_cancel_reaches_a_slow_download_at_once(hub, fetch):
    url = hub.add_file("/x", CONTENT)
    hub.drip("/x", size=1000, seconds=0.05)
    began = time.monotonic()

    def cancel():
        if time.monotonic() - began > 0.2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(url, check=cancel)
    assert time.monotonic() - began < 0.6


def test_cancel_reaches_a_wait_between_two_tries(hub, fetch):
    url = hub.add_file("/x", CONTENT)
    hub.fail("/x", 503, headers={"Retry-After": "20"})
    began = time.monotonic()

    def cancel():
        if hub.requests:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(url, check=cancel)
    assert time.monotonic() - began < 2


def test_compressed_answer_is_refused(hub, fetch):
    url = hub.add_file("/x", CONTENT, headers={"Content-Encoding": "gzip"})
    with pytest.raises(InvalidFileError, match="Content-Encoding"):
        fetch(url)


def test_disk_errors_are_not_blamed_on_the_network(hub, fetch, tmp_path):
    url = hub.add_file("/x", CONTENT)
    (tmp_path / "file.part").mkdir()
    with pytest.raises(IsADirectoryError):
        fetch(url)
