"""The exact file that a reference stands for at the moment."""

from dataclasses import dataclass
from pathlib import Path

from weights.http import Remote


@dataclass(frozen=True)
class HubFile:
    """A file of a Hugging Face repository at one commit."""

    repo: str
    commit: str
    file: str


@dataclass(frozen=True)
class Artifact:
    """One exact file, and how to get it.

    pin: identifies these bytes as seen with these credentials, so that a cached file with this pin
        can be used without a request; None if the source cannot tell two versions apart.
    source, revision: for logs and errors; no secrets.
    size: bytes, perhaps rounded. sha256: lower-case hex. validator: ETag or Last-Modified date.
    """

    pin: str | None
    source: str
    revision: str
    location: HubFile | Remote | Path | bytes
    size: int | None = None
    sha256: str | None = None
    validator: str | None = None
    trigger_words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fetched:
    """A .safetensors file on this disk.

    in_place: it lies where its owner keeps it, and must not be moved.
    evictable: it may be deleted to make room.
    """

    path: Path
    sha256: str
    in_place: bool = False
    evictable: bool = True
    trigger_words: tuple[str, ...] = ()
