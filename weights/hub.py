"""What everything from the Hugging Face hub shares: HTTP, quiet logs, and errors in plain words.

Files come over HTTP. With hf_xet, huggingface_hub would fetch large ones by the Hub's own protocol,
Xet, which reports progress in a thread of its own and goes on whatever that raises (its issue
4632). The download of a cancelled request would go on to its end. Operators who want Xet all the
same set HF_HUB_DISABLE_XET=0.
"""

import contextlib
import errno
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from tqdm import tqdm

from weights.serving.errors import (
    AccessDeniedError,
    NotFoundError,
    ReferenceFormatError,
    SourceUnavailableError,
    WeightsError,
)
from weights.serving.redact import without_queries

HTTPError: type[Exception] = HfHubHTTPError.__mro__[1]
"""What the HTTP client of huggingface_hub raises: httpx's, or httpx2's in newer versions."""
HTTP_CLIENT = HTTPError.__module__.partition(".")[0]
LEFT_SECONDS = 3600.0  # without a byte: no download that is under way
LOGGERS_OF_URLS = (HTTP_CLIENT, "huggingface_hub.file_download", "huggingface_hub.utils._http")


def drop_leftovers(place: Path) -> None:
    """Remove what killed downloads have left there: huggingface_hub never goes on with it."""
    for part in place.rglob("*.incomplete"):
        with contextlib.suppress(FileNotFoundError):  # another process may have completed it
            if time.time() - part.stat().st_mtime > LEFT_SECONDS:
                part.unlink()


def progress_bar(report: Callable[[int, int | None, str], None]) -> "type[tqdm[Any]]":
    """A progress bar for huggingface_hub that draws nothing.

    Args:
        report: called with what is done, the total if known, and the unit ("B" for bytes); it may
            raise, to give up.
    """

    counting = threading.Lock()  # the hub's client fetches several files at a time

    class Bar(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:  # noqa: ANN401
            self._counted = str(options.get("unit", "it"))
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            with counting:
                self.n += n or 0
                report(int(self.n), None if self.total is None else int(self.total), self._counted)
            return None

    return Bar


@contextlib.contextmanager
def hub_call(name: str, token: str | None) -> Iterator[None]:
    """Where huggingface_hub is called: its errors become ours, and its log holds no secrets.

    Xet is switched off unless the operator has decided about it.

    Args:
        name: of what is fetched, for messages.
        token: only says whether one is set.

    Raises:
        WeightsError: with a message for the user.
    """
    if "HF_HUB_DISABLE_XET" not in os.environ:
        constants.HF_HUB_DISABLE_XET = True
    with _translated(name, token), _discreet():
        yield


@contextlib.contextmanager
def _discreet() -> Iterator[None]:
    """Cut the queries off the URLs in the libraries' log lines: those of the storage are secret."""

    def redact(record: logging.LogRecord) -> bool:
        record.msg, record.args = without_queries(record.getMessage()), ()
        return True

    loggers = [logging.getLogger(name) for name in LOGGERS_OF_URLS]
    for logger in loggers:
        logger.addFilter(redact)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(redact)


@contextlib.contextmanager
def _translated(name: str, token: str | None) -> Iterator[None]:
    """Turn the errors of huggingface_hub into ours.

    Without their chain: their messages quote whole URLs, and those of the storage are presigned.
    """
    try:
        yield
    except GatedRepoError:
        raise AccessDeniedError(
            f"{name}: the repository is gated. Accept its conditions on its page, with the account "
            f"whose token is in HF_TOKEN ({_token_state(token)})."
        ) from None
    except RepositoryNotFoundError:
        raise _unseen(name, token) from None
    except RevisionNotFoundError:
        raise NotFoundError(f"{name}: no such branch, tag or commit in the repository") from None
    except HfHubHTTPError as error:
        raise _from_status(name, error.response, token) from None
    except HFValidationError as error:
        raise ReferenceFormatError(f"{name}: not a valid name of a repository: {error}") from error
    except (
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RevisionResolutionError,
    ) as error:
        raise _not_reached(name, error, token) from None
    except EntryNotFoundError:
        raise NotFoundError(f"{name}: no such file in the repository") from None
    except (OSError, RuntimeError) as error:
        raise _broken_off(name, error) from None


def _not_reached(name: str, error: Exception, token: str | None) -> WeightsError:
    """Why a file cannot be had; huggingface_hub takes a refusal for a lack of network."""
    cause = error.__cause__
    if isinstance(cause, HfHubHTTPError) and cause.response.status_code == HTTPStatus.FORBIDDEN:
        return _from_status(name, cause.response, token)
    return SourceUnavailableError(
        f"{name}: Hugging Face cannot be reached ({type(error).__name__}). Try again later."
    )


def _broken_off(name: str, error: OSError | RuntimeError) -> Exception:
    """What a failure on this machine or on the way is; hf_xet raises RuntimeErrors for all."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    if f"os error {errno.ENOSPC}" in str(error):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return SourceUnavailableError(
        f"{name}: the download from Hugging Face broke off. Try again later."
    )


def _from_status(name: str, response: Any, token: str | None) -> WeightsError:  # noqa: ANN401
    status = response.status_code
    if status == HTTPStatus.UNAUTHORIZED and not token:
        return _unseen(name, token)
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return AccessDeniedError(
            f"{name}: Hugging Face denies access (HTTP {status}). Check the token in HF_TOKEN "
            f"({_token_state(token)}); a fine-grained one needs read access to the contents of "
            "all public gated repositories."
        )
    if status == HTTPStatus.NOT_FOUND:
        return NotFoundError(f"{name}: no such file in the repository")
    return SourceUnavailableError(
        f"{name}: Hugging Face is busy or down (HTTP {status}). Try again later.",
        retry_after=_wait_of(response),
    )


def _wait_of(response: Any) -> float | None:  # noqa: ANN401
    """Seconds until the Hub's limit of the rate lets more through: t in `"api";r=0;t=158`."""
    limit = re.search(r";\s*t=(\d+)", response.headers.get("RateLimit", ""))
    return float(limit[1]) if limit else None


def _unseen(name: str, token: str | None) -> NotFoundError:
    """The Hub does not tell a missing repository from one that it will not show."""
    return NotFoundError(
        f"{name}: Hugging Face has no such repository, or it is private. Check the spelling; "
        f"a private one needs a token in HF_TOKEN ({_token_state(token)})."
    )


def _token_state(token: str | None) -> str:
    return "one is set" if token else "none is set"
