"""What a user's text names: one of the places where adapters live. Pure: no network, no files.

A Reference is what was asked for; lora/sources.py finds out what it is at this moment. `key`
identifies it for the cache and may hold secrets; `display` is for logs and errors and never does.
"""

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, parse_qs, unquote, unquote_to_bytes, urlsplit

from weights.errors import ReferenceFormatError
from weights.redact import one_line, without_secrets

FORMS = """\
  owner/name, owner/name/version or owner/name:version        a fine-tune on Replicate
  huggingface.co/owner/name                                   a repository with one LoRA
  huggingface.co/owner/name/blob/main/file.safetensors        a file of a repository
  civitai.com/models/123 or civitai.com/models/123?modelVersionId=456
  https://host/path/file.safetensors or https://host/path/file.tar
  data:application/octet-stream;base64,...                    the file itself"""

_SLUG = re.compile(r"[a-z0-9][a-z0-9._-]*", re.IGNORECASE)
_VERSION = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WEIGHTS_NAME = re.compile(r"\.(safetensors|tar|tar\.gz|tgz)\b", re.IGNORECASE)
_WEIGHTS_PATH = re.compile(r"\.(safetensors|tar|tar\.gz|tgz)/*$", re.IGNORECASE)
_HF_HOSTS = {"huggingface.co", "hf.co"}
_HF_VIEWS = {"blob", "resolve", "raw", "tree"}
_HF_OTHER = {"datasets", "spaces", "collections", "papers", "docs", "models"}


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

    token: one that the user put into the link.
    """

    model: int | None = None
    version: int | None = None
    token: str | None = field(default=None, repr=False)

    @property
    def display(self) -> str:
        """For logs and errors."""
        if self.model is None:
            return f"civitai.com/api/download/models/{self.version}"
        version = f"?modelVersionId={self.version}" if self.version else ""
        return f"civitai.com/models/{self.model}{version}"

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


def parse_reference(text: str, *, allow_local_paths: bool = False) -> Reference:
    """Read a reference as users write it; raises ReferenceFormatError with the accepted forms."""
    text = text.strip()
    if text[:5].lower() == "data:":
        return _data(text)
    if text.startswith(("/", "./", "../", "~")) or text[:5].lower() == "file:":
        return _local(text, allow_local_paths)
    if re.search(r"\s", text):
        raise _not_understood(text, "it contains spaces")
    scheme, separator, rest = text.partition("://")
    if separator and scheme.lower() not in ("http", "https"):
        raise _not_understood(text, "only http and https are fetched")
    try:
        parts = urlsplit(f"{scheme.lower()}://{rest}" if separator else f"https://{text}")
        host = (parts.hostname or "").removeprefix("www.")
        _ = parts.port
    except ValueError as error:
        raise _not_understood(text, "it is not a valid URL") from error
    return _by_host(text, host, parts, named_scheme=bool(separator))


def _by_host(text: str, host: str, parts: SplitResult, *, named_scheme: bool) -> Reference:
    segments = [unquote(segment) for segment in parts.path.split("/") if segment]
    downloaded = segments[:1] in (["datasets"], ["spaces"]) and "resolve" in segments
    if host in _HF_HOSTS and not downloaded:
        return _hugging_face(text, segments)
    if host == "civitai.com":
        return _civitai(text, segments, parse_qs(parts.query))
    if host == "replicate.com":
        return _replicate(text, segments)
    is_weights = _WEIGHTS_PATH.search(parts.path) or _WEIGHTS_NAME.search(unquote(parts.query))
    if (named_scheme or "." in host) and is_weights:
        return UrlReference(parts._replace(fragment="").geturl())
    if named_scheme:
        raise _not_understood(text, "the URL does not name a .safetensors or .tar file")
    return _replicate(text, text.partition("?")[0].split("/"))


def _replicate(text: str, segments: list[str]) -> ReplicateReference:
    segments = [segment for segment in segments if segment]
    if len(segments) >= 2 and ":" in segments[1]:
        segments[1:2] = segments[1].split(":", 1)
    segments = [segment.lower() for segment in segments if segment not in ("versions", "_weights")]
    if len(segments) == 1 or not segments:
        raise _not_understood(text)
    owner, name, *rest = segments
    if not all(_SLUG.fullmatch(part) for part in (owner, name)) or len(rest) > 1:
        raise _not_understood(text)
    if rest and not _VERSION.fullmatch(rest[0]):
        raise _not_understood(text, "a version on Replicate has 64 hexadecimal digits")
    return ReplicateReference(owner, name, *rest)


def _hugging_face(text: str, segments: list[str]) -> HuggingFaceReference:
    if segments and segments[0] in _HF_OTHER:
        raise _not_understood(text, "of anything but a model, give the download link of a file")
    if len(segments) < 2 or not all(_SLUG.fullmatch(part) for part in segments[:2]):
        raise _not_understood(text, "a repository is written huggingface.co/owner/name")
    repo, rest = "/".join(segments[:2]), segments[2:]
    if any(part in ("..", ".") for part in rest):
        raise _not_understood(text)
    if not rest:
        return HuggingFaceReference(repo)
    if rest[0] not in _HF_VIEWS:
        return HuggingFaceReference(repo, file=_safetensors(text, rest))
    view, *rest = rest
    if rest[:1] == ["refs"] and len(rest) >= 3:
        rest = ["/".join(rest[:3]), *rest[3:]]
    revision, *place = rest or (None,)
    if view == "tree" and not (place and place[-1].lower().endswith(".safetensors")):
        return HuggingFaceReference(repo, revision, folder="/".join(place) or None)
    return HuggingFaceReference(repo, revision, file=_safetensors(text, place))


def _safetensors(text: str, place: list[str]) -> str:
    if not place or not place[-1].lower().endswith(".safetensors"):
        raise _not_understood(text, "only .safetensors files are read from Hugging Face")
    return "/".join(place)


def _civitai(text: str, segments: list[str], query: dict[str, list[str]]) -> CivitaiReference:
    token = query.get("token", [None])[0]
    asked = query.get("modelVersionId", [None])[0]
    match segments:
        case ["api", "download", "models", number, *_] | ["api", "v1", "model-versions", number]:
            return CivitaiReference(version=_number(text, number), token=token)
        case ["models", number, *_] | ["api", "v1", "models", number]:
            version = None if asked is None else _number(text, asked)
            return CivitaiReference(_number(text, number), version, token)
    raise _not_understood(text, "a CivitAI page is written civitai.com/models/123")


def _number(text: str, digits: str) -> int:
    if not (digits.isascii() and digits.isdigit() and len(digits) < 16):
        raise _not_understood(text, "models and versions on CivitAI have numbers")
    return int(digits)


def _data(text: str) -> DataReference:
    header, comma, body = text[5:].partition(",")
    media_type, *options = header.lower().split(";")
    if not comma:
        raise _not_understood("data:...", "a data URI has a comma before its data")
    try:
        is_base64 = "base64" in (option.strip() for option in options)
        compact = "".join(unquote(body).split())
        data = base64.b64decode(compact, validate=True) if is_base64 else unquote_to_bytes(body)
    except (binascii.Error, ValueError) as error:
        raise _not_understood("data:...;base64,...", "its base64 is damaged") from error
    return DataReference(data, one_line(media_type or "text/plain"))


def _local(text: str, allowed: bool) -> LocalReference:
    if not allowed:
        raise _not_understood(text, "paths on this machine need LORA_ALLOW_LOCAL_PATHS=true")
    path = unquote(urlsplit(text).path) if text[:5].lower() == "file:" else text
    return LocalReference(Path(path).expanduser())


def _not_understood(text: str, why: str = "") -> ReferenceFormatError:
    given = without_secrets(text) or "(nothing)"
    reason = f": {why}" if why else ""
    return ReferenceFormatError(f"Cannot read {given!r} as an adapter{reason}. Accepted:\n{FORMS}")
