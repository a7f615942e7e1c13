"""HTTP for downloads: one session, checked addresses, and tokens that go to their own hosts only.

requests follows redirects, and drops the Authorization header when one leads to another host. The
session ignores the environment: a proxy would connect on our behalf and bypass the address check,
and a .netrc would add other credentials. It keeps no cookies, because a cookie from one user's
request would be sent with the next user's.
"""

import contextlib
import email.utils
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.cookiejar import DefaultCookiePolicy
from urllib.parse import urlsplit

import requests
import urllib3

from weights.download.addresses import PublicOnlyAdapter
from weights.download.retry import RetryPolicy
from weights.serving.errors import (
    AccessDeniedError,
    NotFoundError,
    SourceUnavailableError,
    WeightsError,
)
from weights.serving.redact import one_line
from weights.serving.settings import Settings

MAX_JSON_BYTES = 8 << 20
MAX_ERROR_BYTES = 4096
MAX_REDIRECTS = 10
TEMPORARY = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}
NOT_THERE = {HTTPStatus.NOT_FOUND, HTTPStatus.GONE}


@dataclass(frozen=True)
class HttpSettings:
    """Limits and timeouts of HTTP.

    Attributes:
        allow_private_hosts: reach addresses outside the public internet, for a store of one's own.
        connect_timeout, read_timeout: seconds to wait for a connection, and for the next bytes.
        max_bytes: the largest file to accept.
        min_rate, min_rate_seconds: bytes per second below which a download is given up, judged once
            it has run that many seconds.
    """

    allow_private_hosts: bool = False
    connect_timeout: float = 10.0
    read_timeout: float = 30.0
    max_bytes: int = Settings.lora_max_file_bytes
    min_rate: float = 4096.0
    min_rate_seconds: float = 60.0


@dataclass(frozen=True)
class Credential:
    """A token, the variable it came from, and the only origins that it may be sent to.

    Attributes:
        origin: of the source.
        others: of the same owner.
    """

    variable: str
    origin: str
    token: str | None = field(default=None, repr=False)
    others: tuple[str, ...] = ()

    def is_for(self, url: str) -> bool:
        """Whether a URL is on one of the origins."""
        return origin(url) in map(origin, (self.origin, *self.others))


@dataclass(frozen=True)
class Remote:
    """A URL, the name it goes by in messages and logs, and the credential of its host."""

    url: str = field(repr=False)
    name: str
    credential: Credential | None = None

    def headers(self) -> dict[str, str]:
        """Return the Authorization header if the URL is on an origin of the credential."""
        owner = self.credential
        if owner is None or not owner.token or not owner.is_for(self.url):
            return {}
        return {"Authorization": f"Bearer {owner.token}"}


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


def origin(url: str) -> tuple[str, str, int | None]:
    """Scheme, host and port of a URL, as far as they decide who may see a token."""
    parts = urlsplit(url)
    default = {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or default


class HttpClient:
    """Opens URLs that users gave, and raises nothing but WeightsError."""

    def __init__(self, settings: HttpSettings) -> None:
        self.settings = settings
        self._session = requests.Session()
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
        self, remote: Remote, headers: Mapping[str, str] | None = None, accept: tuple[int, ...] = ()
    ) -> Iterator[requests.Response]:
        """Start one GET and yield its response, the body unread; no retries.

        Args:
            accept: error statuses that the caller wants to see instead of an exception.
        """
        timeouts = (self.settings.connect_timeout, self.settings.read_timeout)
        all_headers = {**remote.headers(), **(headers or {})}
        with _translated(remote):
            response = self._session.get(
                remote.url, headers=all_headers, timeout=timeouts, stream=True
            )
        with response:
            if response.status_code not in accept:
                _raise_for_status(response, remote)
            yield response

    def probe(self, remote: Remote, retry: RetryPolicy) -> Probe:
        """Ask about a file without fetching it.

        This is a GET that is dropped after its header: URLs presigned for GET refuse a HEAD.
        """

        def ask() -> Probe:
            with self.open(remote) as response:
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
            with self.open(remote, headers) as response, _translated(remote):
                return bytes(response.raw.read(MAX_JSON_BYTES))

        body = retry.run(ask)
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


def _raise_for_status(response: requests.Response, remote: Remote) -> None:
    status = response.status_code
    if status < HTTPStatus.MULTIPLE_CHOICES:
        return
    detail = _detail(response)
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        raise AccessDeniedError(f"{remote.name}: access denied ({detail}). {_advice(remote)}")
    if status in NOT_THERE:
        raise NotFoundError(f"{remote.name}: not found ({detail}). Check the spelling of the link.")
    if status in TEMPORARY or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        raise SourceUnavailableError(
            f"{remote.name}: the source is busy or down ({detail}). Try again later.",
            retry_after=_retry_after(response),
        )
    raise WeightsError(f"{remote.name}: the source refuses the request ({detail})")


def _detail(response: requests.Response) -> str:
    """Status, and the short message of a JSON body as the sites here write it."""
    detail = f"HTTP {response.status_code}"
    with contextlib.suppress(ValueError, urllib3.exceptions.HTTPError, OSError):
        body = json.loads(response.raw.read(MAX_ERROR_BYTES))
        if isinstance(body, dict):
            said = [body.get("message") or body.get("error"), body.get("deadline")]
            detail = ": ".join([detail, *(one_line(str(part)) for part in said if part)])
    return detail


def _advice(remote: Remote) -> str:
    owner = remote.credential
    if owner is None:
        return "The link is private or has expired: give one that works without a login."
    if not owner.token:
        return f"If it needs a login, set {owner.variable} where this model runs."
    return f"The token in {owner.variable} is not valid for it, or has no access to it."


def _retry_after(response: requests.Response) -> float | None:
    """Seconds from a Retry-After header, which holds either seconds or a date."""
    text = response.headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return float(text)
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return None
