"""Download one file; only a complete and verified file takes its name."""

import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import requests

from weights.download.http import HttpClient, content_length, read_body
from weights.download.remote import Remote
from weights.download.retry import RetryPolicy
from weights.serving.errors import InvalidFileError, SourceUnavailableError, WeightsError

logger = logging.getLogger(__name__)

CHUNK = 1 << 18
LOG_SECONDS = 5.0
VALIDATORS = ("ETag", "Last-Modified")

Progress = Callable[[int, int | None], None]
"""Called with the bytes there are so far and the bytes there will be, if known."""


@dataclass(frozen=True)
class Expected:
    """What is known of a file beforehand; None where it is not.

    Attributes:
        size: bytes.
        sha256: lower-case hex.
        validator: ETag or Last-Modified date.
    """

    size: int | None = None
    sha256: str | None = None
    validator: str | None = None


class LogProgress:
    """Logs how far a download has come, every few seconds."""

    def __init__(self, name: str, every: float = LOG_SECONDS) -> None:
        self._name, self._every, self._last = name, every, time.monotonic()

    def __call__(self, done: int, total: int | None) -> None:
        """Log bytes done of total, if the last line is long enough ago."""
        if time.monotonic() - self._last < self._every:
            return
        self._last = time.monotonic()
        share = f" of {total / 1e6:.1f}" if total else ""
        logger.info("%s: %.1f%s MB", self._name, done / 1e6, share)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file as lower-case hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_size(name: str, size: int | None, limit: int) -> None:
    """Raise InvalidFileError if a file of that many bytes is larger than the limit."""
    if size is not None and size > limit:
        raise InvalidFileError(
            f"{name}: {size / 1e9:.2f} GB is more than the {limit / 1e9:.2f} GB accepted for "
            f"an adapter. Is it a whole checkpoint? Give a LoRA."
        )


def download(
    client: HttpClient,
    remote: Remote,
    target: Path,
    *,
    expected: Expected,
    retry: RetryPolicy,
    on_progress: Progress,
) -> str:
    """Fetch a file to `target` and return its SHA-256.

    The bytes go to `target` with `.part` appended, which a later call continues if the server can
    and the file is still the same. Only a complete, verified file takes the name `target`.

    Raises:
        WeightsError: the download failed, or the file is not what is expected.
    """
    part = target.with_name(target.name + ".part")
    transfer = _Transfer(client, remote, part, expected, retry, on_progress)
    try:
        retry.run(transfer.run, progress=lambda: _size(part))
    except BaseException:
        if transfer.sends_another_version:
            part.unlink(missing_ok=True)  # a later call would go on with the version expected
        raise
    digest = sha256_of(part)
    if expected.sha256 not in (None, digest):
        part.unlink()
        raise InvalidFileError(
            f"{remote.name}: the file has SHA-256 {digest}, but its source announces "
            f"{expected.sha256}. It was damaged or replaced on the way: try again, and do not use "
            f"it if this repeats."
        )
    part.replace(target)
    return digest


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


class _Transfer:
    """The attempts of one download; each resumes where the previous one stopped."""

    def __init__(
        self,
        client: HttpClient,
        remote: Remote,
        part: Path,
        expected: Expected,
        retry: RetryPolicy,
        on_progress: Progress,
    ) -> None:
        self._client, self._remote, self._part = client, remote, part
        self._expected, self._retry, self._on_progress = expected, retry, on_progress
        self._validator = _strong(expected.validator)

    @property
    def sends_another_version(self) -> bool:
        """Whether the server's file is another than the one expected, by its ETag."""
        expected = _strong(self._expected.validator)
        return expected not in (None, self._validator)

    def run(self) -> None:
        """Make one attempt; raises SourceUnavailableError if another may succeed."""
        offset = _size(self._part)
        if offset and offset == self._expected.size:
            return
        headers = self._resume_headers(offset)
        accept = (HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,)
        check_cancelled = self._retry.check_cancelled
        with self._client.open(self._remote, headers, accept, check_cancelled) as response:
            if response.status_code in accept:
                self._part.unlink()
                raise SourceUnavailableError(f"{self._remote.name}: changed while it was fetched")
            start = self._start_of(response, offset)
            length = content_length(response)
            total = self._expected.size if length is None else start + length
            self._check_total(total)
            self._validator = _strong(response.headers.get("ETag")) or self._validator
            done = self._write(response, start, total)
        if total is not None and done != total:
            raise SourceUnavailableError(
                f"{self._remote.name}: the connection broke after {done} of {total} bytes"
            )

    def _resume_headers(self, offset: int) -> dict[str, str]:
        """A range is asked for only if mixing two versions of the file would be noticed."""
        if not offset or not (self._validator or self._expected.sha256):
            return {}
        condition = {"If-Range": self._validator} if self._validator else {}
        return {"Range": f"bytes={offset}-", **condition}

    def _start_of(self, response: requests.Response, offset: int) -> int:
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise InvalidFileError(
                f"{self._remote.name}: the server compresses the file on the way, so its size and "
                f"hash cannot be checked. Store it without Content-Encoding."
            )
        if response.status_code != HTTPStatus.PARTIAL_CONTENT:
            return 0
        if not response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
            self._part.unlink()
            raise SourceUnavailableError(f"{self._remote.name}: the server sent a wrong range")
        seen = {response.headers.get(name) for name in VALIDATORS} - {None}
        if self._validator and seen and self._validator not in seen:  # If-Range was ignored
            self._part.unlink()
            raise SourceUnavailableError(f"{self._remote.name}: changed while it was fetched")
        return offset

    def _check_total(self, total: int | None) -> None:
        check_size(self._remote.name, total, self._client.settings.max_bytes)
        if self._expected.size is not None and total != self._expected.size:
            self._part.unlink(missing_ok=True)
            raise InvalidFileError(
                f"{self._remote.name}: the server sends {total} bytes, but its source announces "
                f"{self._expected.size}. Try again; the file may just have been replaced."
            )

    def _write(self, response: requests.Response, start: int, total: int | None) -> int:
        done, began = start, time.monotonic()
        with self._part.open("r+b" if start else "wb") as file:
            file.seek(start)
            for chunk in read_body(response, self._remote, CHUNK):
                self._retry.check_cancelled()
                file.write(chunk)
                done += len(chunk)
                check_size(self._remote.name, done, self._client.settings.max_bytes)
                self._check_rate(done - start, time.monotonic() - began)
                self._on_progress(done, total)
        return done

    def _check_rate(self, received: int, seconds: float) -> None:
        settings = self._client.settings
        if seconds > settings.min_rate_seconds and received < settings.min_rate * seconds:
            raise WeightsError(
                f"{self._remote.name}: the server sends less than {settings.min_rate:.0f} bytes "
                f"per second. Put the file on a faster one."
            )


def _strong(validator: str | None) -> str | None:
    """A validator that If-Range accepts: a weak ETag does not promise the same bytes."""
    return None if validator is None or validator.startswith("W/") else validator
