"""What the answer of a server means that does not send the file."""

import contextlib
import email.utils
import json
import time
from http import HTTPStatus

import requests
import urllib3

from weights.download.remote import Remote
from weights.serving.errors import (
    AccessDeniedError,
    NotFoundError,
    SourceUnavailableError,
    WeightsError,
)
from weights.serving.redact import one_line, without_queries

MAX_ERROR_BYTES = 4096
TEMPORARY = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}
NOT_THERE = {HTTPStatus.NOT_FOUND, HTTPStatus.GONE}


def refusal(response: requests.Response, remote: Remote) -> WeightsError:
    """What an answer without the file means."""
    status = response.status_code
    detail = _detail(response)
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return AccessDeniedError(f"{remote.name}: access denied ({detail}). {_advice(remote)}")
    if status in NOT_THERE:
        return NotFoundError(
            f"{remote.name}: not found ({detail}). Check the spelling of the link."
        )
    if status in TEMPORARY or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return SourceUnavailableError(
            f"{remote.name}: the source is busy or down ({detail}). Try again later.",
            retry_after=_retry_after(response),
        )
    return WeightsError(f"{remote.name}: the source refuses the request ({detail})")


def _detail(response: requests.Response) -> str:
    """Status, and the short message of a JSON body as the sites here write it."""
    detail = f"HTTP {response.status_code}"
    with contextlib.suppress(ValueError, urllib3.exceptions.HTTPError, OSError):
        body = json.loads(response.raw.read(MAX_ERROR_BYTES))
        if isinstance(body, dict):
            said = [body.get("message") or body.get("error"), body.get("deadline")]
            parts = (one_line(without_queries(str(part))) for part in said if part)
            detail = ": ".join([detail, *parts])
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
