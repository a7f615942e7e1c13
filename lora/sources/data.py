"""Adapters in the request itself, as data: URIs."""

import base64
import binascii
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self
from urllib.parse import unquote, unquote_to_bytes

from lora.sources.link import Link
from lora.sources.reference import Access, Artifact, FetchedFile, Reference
from weights.download.retry import RetryPolicy
from weights.download.transfer import Progress, sha256_of
from weights.serving.redact import one_line


@dataclass(frozen=True)
class DataReference(Reference):
    """The file itself, from a data: URI."""

    data: bytes = field(repr=False)
    media_type: str

    forms = ("data:application/octet-stream;base64,...                    the file itself",)
    immutable = True

    @classmethod
    def parse(cls, link: Link) -> Self | None:
        if link.text[:5].lower() != "data:":
            return None
        header, comma, body = link.text[5:].partition(",")
        media_type, *options = header.lower().split(";")
        if not comma:
            raise link.refused("a data URI has a comma before its data", "data:...")
        try:
            is_base64 = "base64" in (option.strip() for option in options)
            compact = "".join(unquote(body).split())
            data = base64.b64decode(compact, validate=True) if is_base64 else unquote_to_bytes(body)
        except (binascii.Error, ValueError) as error:
            raise link.refused("its base64 is damaged", "data:...;base64,...") from error
        return cls(data, one_line(media_type or "text/plain"))

    @property
    def display(self) -> str:
        return f"data:{self.media_type} ({len(self.data)} bytes)"

    @property
    def key(self) -> str:
        return f"data:{hashlib.sha256(self.data).hexdigest()}"

    def resolve(self, access: Access, retry: RetryPolicy) -> "InlineArtifact":
        return InlineArtifact(
            pin=self.key,
            source=self.display,
            revision="inline",
            size=len(self.data),
            data=self.data,
        )


@dataclass(frozen=True, kw_only=True)
class InlineArtifact(Artifact):
    """A file that came with the request."""

    data: bytes = field(repr=False)

    def fetch(
        self, target: Path, access: Access, retry: RetryPolicy, on_progress: Progress
    ) -> FetchedFile:
        target.write_bytes(self.data)
        return FetchedFile(target, sha256_of(target))
