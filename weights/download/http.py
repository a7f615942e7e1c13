"""HTTP for downloads: one session, checked addresses, and answers within limits.

requests follows redirects, and drops the Authorization header when one leads to another host. The
session ignores the environment: a proxy would connect on our behalf and bypass the address check,
and a .netrc would add other credentials. It keeps no cookies, because a cookie from one user's
request would be sent with the next user's.
"""

import contextlib
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.cookiejar import DefaultCookiePolicy

import requests
import urllib3

from weights.download.addresses import PublicOnlyAdapter
from weights.download.refusal import refusal
from weights.download.remote import Remote
from weights.download.retry import RetryPolicy
from weights.serving.cancel import CheckCancelled, T, cancellable, never_cancelled
from weights.serving.errors import SourceUnavailableError, WeightsError
from weights.serving.settings import Settings

MAX_JSON_BYTES = 8 << 20
MAX_REDIRECTS = 10


@dataclass(frozen=True)
class HttpSettings:
    """Limits and timeouts of HTTP.

    Attributes:
        allow_private_hosts: reach addresses outside the public internet, for a store of one's own.
        connect_timeout, read_timeout: seconds to wait for a connection, and for the next bytes.
        answer_timeout: seconds to wait for an answer to begin, redirects included, and for the
            whole of one that is short.
        max_bytes: the largest file to accept.
        min_rate, min_rate_seconds: bytes per second below which a download is given up, judged once
            it has run that many seconds.
    """

    allow_private_hosts: bool = False
    connect_timeout: float = 10.0
    read_timeout: float = 30.0
    answer_timeout: float = 60.0
    max_bytes: int = Settings.lora_max_file_bytes
    min_rate: float = 4096.0
    min_rate_seconds: float = 60.0


@dataclass(frozen=True)
class Probe:
    """What a server says about a file before sending it.

    Attributes:
        validator: the ETag, or else the Last-Modified date; None if the server gives neither.
        size: bytes, if told.
        content_type: lower case, without parameters.
    """

    validator: str | None
    size: int | None
    content_type: str


class _Session(requests.Session):
    """Does not read the bodies of redirects, which may be endless, or swell when decompressed."""

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        target = super().get_redirect_target(resp)
        if target is not None:
            header = resp.raw._original_response  # in which requests finds cookies for the target
            resp.raw.close()
            resp.raw = urllib3.HTTPResponse(
                io.BytesIO(), preload_content=False, original_response=header
            )
        return target


class HttpClient:
    """Opens URLs that users gave, and raises nothing but WeightsError, or that of a cancel."""

    def __init__(self, settings: HttpSettings) -> None:
        self.settings = settings
        self._session = _Session()
        self._session.trust_env = False
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        self._session.max_redirects = MAX_REDIRECTS
        self._session.headers.update({"Accept-Encoding": "identity"})
        if not settings.allow_private_hosts:
            self._session.mount("http://", PublicOnlyAdapter())
            self._session.mount("https://", PublicOnlyAdapter())

    def close(self) -> None:
        """Close the connections that are kept for the next request."""
        self._session.close()

    @contextlib.contextmanager
    def open(
        self,
        remote: Remote,
        headers: Mapping[str, str] | None = None,
        accept: tuple[int, ...] = (),
        check_cancelled: CheckCancelled = never_cancelled,
    ) -> Iterator[requests.Response]:
        """Start one GET and yield its response, the body unread; no retries.

        Args:
            accept: error statuses that the caller wants to see instead of an exception.
        """

        def get() -> requests.Response:
            return self._get(remote, headers or {}, accept)

        with self._wait_for(get, remote, check_cancelled, requests.Response.close) as response:
            yield response

    def _get(
        self, remote: Remote, headers: Mapping[str, str], accept: tuple[int, ...] = ()
    ) -> requests.Response:
        timeouts = (self.settings.connect_timeout, self.settings.read_timeout)
        headers = {**remote.headers(), **headers}
        with _translated(remote):
            response = self._session.get(remote.url, headers=headers, timeout=timeouts, stream=True)
        if response.status_code >= HTTPStatus.MULTIPLE_CHOICES and (
            response.status_code not in accept
        ):
            with response:
                raise refusal(response, remote)
        return response

    def _wait_for(
        self,
        work: Callable[[], T],
        remote: Remote,
        check_cancelled: CheckCancelled,
        discard: Callable[[T], object] = lambda _: None,
    ) -> T:
        """The result of a request, which a server can draw out by sending a byte now and then."""
        seconds = self.settings.answer_timeout
        try:
            return cancellable(work, check_cancelled, seconds, discard)
        except TimeoutError:
            raise SourceUnavailableError(
                f"{remote.name}: the server did not answer within {seconds:.0f} s. It is too slow, "
                "or down: try again later.",
                retry_after=math.inf,  # each try would take as long
            ) from None

    def probe(self, remote: Remote, retry: RetryPolicy) -> Probe:
        """Ask about a file without fetching it.

        This is a GET that is dropped after its header: URLs presigned for GET refuse a HEAD.
        """

        def ask() -> Probe:
            with self.open(remote, check_cancelled=retry.check_cancelled) as response:
                return Probe(
                    validator=response.headers.get("ETag") or response.headers.get("Last-Modified"),
                    size=content_length(response),
                    content_type=response.headers.get("Content-Type", "").split(";")[0].lower(),
                )

        return retry.run(ask)

    def get_json(self, remote: Remote, retry: RetryPolicy) -> object:
        """Return the parsed body of a small JSON answer."""

        def ask() -> bytes:
            headers = {"Accept": "application/json"}
            with self._get(remote, headers) as response, _translated(remote):
                return bytes(response.raw.read(MAX_JSON_BYTES))

        body = retry.run(lambda: self._wait_for(ask, remote, retry.check_cancelled))
        try:
            return json.loads(body)
        except ValueError as error:
            raise SourceUnavailableError(
                f"{remote.name}: the source answered with something other than JSON. It may be "
                f"under maintenance: try again later."
            ) from error


def content_length(response: requests.Response) -> int | None:
    """Bytes of the body that follows, if the server tells."""
    text = response.headers.get("Content-Length", "")
    return int(text) if text.isascii() and text.isdigit() else None


def read_body(response: requests.Response, remote: Remote, size: int) -> Iterator[bytes]:
    """Yield the body in pieces of up to `size` bytes, each as soon as it arrives."""
    while True:
        with _translated(remote):
            piece = response.raw.read1(size, decode_content=False)
        if not piece:
            return
        yield piece


@contextlib.contextmanager
def _translated(remote: Remote) -> Iterator[None]:
    """Turn the errors of requests and urllib3 into ours.

    Without their chain: their messages quote the whole URL, and its query may be a secret.
    """
    try:
        yield
    except WeightsError:
        raise
    except requests.exceptions.TooManyRedirects:
        raise WeightsError(
            f"{remote.name}: more than {MAX_REDIRECTS} redirects. Give the link they lead to."
        ) from None
    except ValueError:
        raise WeightsError(
            f"{remote.name}: this URL, or one that it redirects to, is not a valid http or https "
            f"URL. Check the link."
        ) from None
    except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError) as error:
        raise SourceUnavailableError(
            f"{remote.name}: the connection failed ({type(error).__name__}). Check the link; if "
            f"it is right, the server is down or too slow: try again later."
        ) from None
