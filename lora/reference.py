"""What a user's text names: one of the places where adapters live. Pure: no network, no files.

A Reference is what was asked for. lora/links.py reads it from text, and lora/sources.py finds out
what it is at this moment. `key`
identifies it for the cache and may hold secrets; `display` is for logs and errors and never does.
"""

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

from weights.redact import without_secrets

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class ReplicateReference:
    """A fine-tune on Replicate; without a version, the newest."""

    owner: str
    name: str
    version: str | None = None

    @property
    def display(self) -> str:
        """For logs and errors."""
        version = f":{self.version}" if self.version else ""
        return f"replicate.com/{self.owner}/{self.name}{version}"

    key = display

    @property
    def immutable(self) -> bool:
        """Whether it names the same bytes for ever."""
        return self.version is not None


@dataclass(frozen=True)
class HuggingFaceReference:
    """A repository on Hugging Face; optionally a revision, and a file or a folder in it."""

    repo: str
    revision: str | None = None
    file: str | None = None
    folder: str | None = None

    @property
    def display(self) -> str:
        """For logs and errors."""
        place = self.file or self.folder
        if self.revision is None and place is None:
            return f"huggingface.co/{self.repo}"
        view = "blob" if self.file else "tree"
        parts = ["huggingface.co", self.repo, view, self.revision or "main", place]
        return "/".join(part for part in parts if part)

    key = display

    @property
    def immutable(self) -> bool:
        """Whether it names the same bytes for ever."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None


@dataclass(frozen=True)
class CivitaiReference:
    """A model page or a version on CivitAI. Both have numbers, which are not the same ones.

    CivitAI is several sites (civitai.com, .red, .green) with the same numbers.

    token: one that the user put into the link. file: one of several in a version, by its number.
    """

    model: int | None = None
    version: int | None = None
    token: str | None = field(default=None, repr=False)
    file: int | None = None

    @property
    def display(self) -> str:
        """For logs and errors."""
        file = f" file {self.file}" if self.file else ""
        if self.model is None:
            return f"civitai.com/api/download/models/{self.version}{file}"
        version = f"?modelVersionId={self.version}" if self.version else ""
        return f"civitai.com/models/{self.model}{version}{file}"

    @property
    def key(self) -> str:
        """Identity, with the token: what one token may see is not for another."""
        return f"{self.display} {self.token or ''}"

    @property
    def immutable(self) -> bool:
        """Whether it names the same bytes for ever."""
        return self.version is not None


@dataclass(frozen=True)
class UrlReference:
    """A file behind a URL, whose query and user part may be secrets."""

    url: str = field(repr=False)
    immutable: bool = field(default=False, init=False)

    @property
    def display(self) -> str:
        """For logs and errors: the URL without user, query and fragment."""
        return without_secrets(self.url)

    @property
    def key(self) -> str:
        """Identity, with the query: another signature may not see what this one may."""
        return self.url


@dataclass(frozen=True)
class DataReference:
    """The file itself, from a data: URI."""

    data: bytes = field(repr=False)
    media_type: str
    immutable: bool = field(default=True, init=False)

    @property
    def display(self) -> str:
        """For logs and errors."""
        return f"data:{self.media_type} ({len(self.data)} bytes)"

    @property
    def key(self) -> str:
        """Identity."""
        return f"data:{hashlib.sha256(self.data).hexdigest()}"


@dataclass(frozen=True)
class LocalReference:
    """A file on this machine."""

    path: Path
    immutable: bool = field(default=False, init=False)

    @property
    def display(self) -> str:
        """For logs and errors."""
        return str(self.path)

    key = display


Reference = (
    ReplicateReference
    | HuggingFaceReference
    | CivitaiReference
    | UrlReference
    | DataReference
    | LocalReference
)
