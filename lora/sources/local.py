"""Adapters on this machine, where the operator allows it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import unquote, urlsplit

from lora.sources.link import Link
from lora.sources.reference import Access, Artifact, FetchedFile, Reference
from weights.download.retry import RetryPolicy
from weights.download.transfer import Progress, sha256_of
from weights.serving.errors import NotFoundError


@dataclass(frozen=True)
class LocalReference(Reference):
    """A file on this machine."""

    path: Path

    forms = ()  # an operator's, not a caller's

    @classmethod
    def parse(cls, link: Link) -> Self | None:
        text = link.text
        is_url = text[:5].lower() == "file:"
        if not (is_url or text.startswith(("/", "./", "../", "~"))):
            return None
        if not link.allow_local_paths:
            raise link.refused("paths on this machine need LORA_ALLOW_LOCAL_PATHS=true")
        return cls(Path(unquote(urlsplit(text).path) if is_url else text).expanduser())

    @property
    def display(self) -> str:
        return str(self.path)

    def resolve(self, access: Access, retry: RetryPolicy) -> "LocalArtifact":
        path = self.path.resolve()
        if not path.is_file():
            raise NotFoundError(f"{self.display}: no such file on the machine of this model")
        stat = path.stat()
        return LocalArtifact(
            pin=f"local {path} {stat.st_mtime_ns} {stat.st_size}",
            source=self.display,
            revision=f"modified {stat.st_mtime_ns}",
            size=stat.st_size,
            path=path,
        )


@dataclass(frozen=True, kw_only=True)
class LocalArtifact(Artifact):
    """A file that stays where it is."""

    path: Path

    def fetch(
        self, target: Path, access: Access, retry: RetryPolicy, on_progress: Progress
    ) -> FetchedFile:
        return FetchedFile(self.path, sha256_of(self.path), in_place=True, evictable=False)
