"""What every source of adapters has: a reference, what it means now, and how that is fetched.

A new source is a module with a subclass of `Reference` and, unless it is a file behind a URL, a
subclass of `Artifact`. `lora/sources/__init__.py` lists the references.
"""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from lora.sources.link import Link
from weights.download.http import HttpClient
from weights.download.remote import Credential
from weights.download.retry import RetryPolicy
from weights.download.transfer import Progress
from weights.serving.settings import Settings


@dataclass(frozen=True)
class Access:
    """How sources are reached: their endpoints and tokens, and the HTTP client."""

    settings: Settings
    client: HttpClient


@dataclass(frozen=True)
class FetchedFile:
    """A file on this disk: a .safetensors file, or a tar that holds one.

    Attributes:
        in_place: it lies where its owner keeps it, and must not be moved.
        evictable: it may be deleted to make room.
        settings: what PEFT's adapter_config.json beside it says, as JSON; empty if nothing.
    """

    path: Path
    sha256: str
    in_place: bool = False
    evictable: bool = True
    trigger_words: tuple[str, ...] = ()
    settings: str = ""


@dataclass(frozen=True, kw_only=True)
class Artifact(ABC):
    """The exact file that a reference means at the moment.

    Attributes:
        pin: identifies these bytes as seen with these credentials, so that a cached file with this
            pin can be used without a request; None if the source cannot tell two versions apart.
        source, revision: for logs and errors; no secrets.
        size: bytes, perhaps rounded.
        sha256: lower-case hex.
    """

    pin: str | None
    source: str
    revision: str
    size: int | None = None
    sha256: str | None = None
    trigger_words: tuple[str, ...] = ()

    @property
    def room(self) -> tuple[int, Path | None]:
        """The bytes that fetching it writes, and where; None: into the cache of adapters."""
        return self.size or 0, None

    @abstractmethod
    def fetch(
        self, target: Path, access: Access, retry: RetryPolicy, on_progress: Progress
    ) -> FetchedFile:
        """Bring the file to this disk, and verify it.

        Args:
            target: where to put it, unless it is kept elsewhere.

        Raises:
            WeightsError: nothing but an unfinished download is then left at `target`.
        """


class Reference(ABC):
    """What a user's text names, at one of the sources.

    Attributes:
        forms: how users write it, for the error about text that is no reference.
    """

    forms: ClassVar[tuple[str, ...]]

    @classmethod
    @abstractmethod
    def parse(cls, link: Link) -> "Reference | None":
        """Read a link, without network and files; None if it belongs to another source.

        Raises:
            ReferenceFormatError: it belongs to this source, and is wrong.
        """

    @property
    @abstractmethod
    def display(self) -> str:
        """Name for logs and errors; holds no secret."""

    @property
    def key(self) -> str:
        """Identity; may hold secrets."""
        return self.display

    @property
    def immutable(self) -> bool:
        """Whether it names the same bytes for ever."""
        return False

    @property
    def lasting(self) -> bool:
        """Whether it can be of use after a day; a presigned URL cannot."""
        return True

    def credential(self, settings: Settings) -> Credential | None:
        """The source's address, and the operator's token for it."""
        return None

    @abstractmethod
    def resolve(self, access: Access, retry: RetryPolicy) -> Artifact:
        """Find out which file it means now.

        Raises:
            WeightsError: with a message for the user.
        """


def cache_key(reference: Reference, settings: Settings) -> str:
    """Identity of a reference in a cache: what one token sees is not for another."""
    credential = reference.credential(settings)
    seen = "" if credential is None else f"{credential.origin} {fingerprint(credential.token)}"
    return f"{type(reference).__name__} {reference.key} {seen}"


def fingerprint(token: str | None) -> str:
    """A token as a part of a key: its SHA-256."""
    return hashlib.sha256(token.encode()).hexdigest() if token else "anonymous"
