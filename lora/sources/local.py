"""Adapters on this machine, where the operator allows it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import unquote, urlsplit

from lora.peft_config import config_of, read_settings
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
        named = config_of(str(self.path.absolute()))  # of a link: beside the link
        config = Path(named) if named is not None and Path(named).is_file() else None
        return LocalArtifact(
            pin=" ".join(["local", _version(path), *([_version(config)] if config else [])]),
            source=self.display,
            revision=f"modified {stat.st_mtime_ns}",
            size=stat.st_size,
            path=path,
            config=config,
        )


@dataclass(frozen=True, kw_only=True)
class LocalArtifact(Artifact):
    """A file that stays where it is.

    Attributes:
        config: PEFT's adapter_config.json beside it.
    """

    path: Path
    config: Path | None = None

    @property
    def room(self) -> tuple[int, Path | None]:
        taken_out = self.path.suffix != ".safetensors"  # of a tar
        return (self.size or 0) if taken_out else 0, None

    def fetch(
        self, target: Path, access: Access, retry: RetryPolicy, on_progress: Progress
    ) -> FetchedFile:
        settings = read_settings(self.config, self.source) if self.config else ""
        digest = sha256_of(self.path)
        return FetchedFile(self.path, digest, in_place=True, evictable=False, settings=settings)


def _version(file: Path) -> str:
    """What changes with the content of a file."""
    stat = file.stat()
    return f"{file} {stat.st_mtime_ns} {stat.st_size}"
