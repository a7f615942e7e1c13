"""The errors of files that are fetched, kept or written.

Every message says what was given, what was expected and what to do. No message holds a token, or
the query of a URL, because presigned URLs are secrets.
"""


def sentences(*parts: str) -> str:
    """Put the parts of a message one after the other, each with one full stop; "" is left out."""
    return " ".join(part.rstrip(". \n") + "." for part in parts if part)


class WeightsError(ValueError):
    """A file cannot be had or written; the base class of those here."""


class ReferenceFormatError(WeightsError):
    """The text does not name weights in any form that is understood."""


class AccessDeniedError(WeightsError):
    """The source asks for a login, a right or an acceptance that is missing."""


class NotFoundError(WeightsError):
    """The source answers, and has no such model, version or file."""


class ForbiddenAddressError(WeightsError):
    """The URL leads to an address that is not on the public internet."""


class InvalidFileError(WeightsError):
    """What arrived is not the expected file: too large, a wrong hash, or no weights at all."""


class DiskSpaceError(WeightsError):
    """The disk has no room for a file."""


class DirectoryError(WeightsError):
    """A directory that a setting names cannot be made or written."""


class SourceUnavailableError(WeightsError):
    """The source does not answer properly now; the same request may succeed later.

    Attributes:
        retry_after: seconds after which the source asked to be tried again, if it did; infinite
            where another try would be no use.
    """

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after
