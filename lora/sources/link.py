"""The text that a user gives as an adapter, taken apart."""

import re
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import parse_qs, unquote, urlsplit

from weights.serving.errors import ReferenceFormatError
from weights.serving.redact import without_secrets

SLUG = re.compile(r"[a-z0-9][a-z0-9._-]*", re.IGNORECASE)  # an owner, or a name
PROMPT_SYNTAX = re.compile(r"[<(\[]")  # <lora:name:0.8>, (name:1.2), [name]; no link begins so


@dataclass(frozen=True)
class Url:
    """A link read as a URL; `https` is assumed where no scheme is named.

    Attributes:
        segments: of the path, decoded.
        query: the values of each parameter, decoded.
    """

    full: str
    named_scheme: bool
    host: str
    path: str
    raw_query: str

    @cached_property
    def segments(self) -> list[str]:
        return [unquote(segment) for segment in self.path.split("/") if segment]

    @cached_property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(self.raw_query)


@dataclass(frozen=True)
class Link:
    """A user's text, stripped, and whether it may name a file on this machine."""

    text: str
    allow_local_paths: bool = False

    @cached_property
    def word(self) -> str:
        """The text if it is one word, as all links are.

        Raises:
            ReferenceFormatError: it has spaces, or is the syntax of a prompt.
        """
        if PROMPT_SYNTAX.match(self.text):
            raise self.refused("this is prompt syntax, and a link to the LoRA is needed")
        if re.search(r"\s", self.text):
            raise self.refused("it contains spaces")
        return self.text

    @cached_property
    def url(self) -> Url:
        """The text as a URL.

        Raises:
            ReferenceFormatError: it is none, or of a scheme that is not fetched.
        """
        scheme, separator, rest = self.word.partition("://")
        if separator and scheme.lower() not in ("http", "https"):
            raise self.refused("only http and https are fetched")
        try:
            parts = urlsplit(f"{scheme.lower()}://{rest}" if separator else f"https://{self.text}")
            host = (parts.hostname or "").removeprefix("www.")
            _ = parts.port
        except ValueError as error:
            raise self.refused("it is not a valid URL") from error
        full = parts._replace(fragment="").geturl()
        return Url(full, bool(separator), host, parts.path, parts.query)

    def refused(self, why: str = "", shown: str | None = None) -> ReferenceFormatError:
        """The error about this text; `shown` stands for it where it is too long or secret."""
        given = shown or without_secrets(self.text) or "(nothing)"
        return ReferenceFormatError(
            f"Cannot read {given!r} as an adapter" + (f": {why}" if why else "")
        )
