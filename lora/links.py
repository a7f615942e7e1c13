"""Text to reference: every form in which users write where an adapter is.

Pure: no network, no files.
"""

import base64
import binascii
import re
from pathlib import Path
from urllib.parse import SplitResult, parse_qs, unquote, unquote_to_bytes, urlsplit

from lora.reference import (
    CivitaiReference,
    DataReference,
    HuggingFaceReference,
    LocalReference,
    Reference,
    ReplicateReference,
    UrlReference,
)
from weights.errors import ReferenceFormatError
from weights.redact import one_line, without_secrets

FORMS = """\
  owner/name, owner/name/version or owner/name:version        a fine-tune on Replicate
  huggingface.co/owner/name or hf:owner/name                  a repository with one LoRA
  huggingface.co/owner/name/blob/main/file.safetensors        a file of a repository
  civitai.com/models/123 or civitai.com/models/123?modelVersionId=456
  urn:air:flux1:lora:civitai:123@456                          CivitAI's own identifier
  https://host/path/file.safetensors or https://host/path/file.tar
  data:application/octet-stream;base64,...                    the file itself"""

_SLUG = re.compile(r"[a-z0-9][a-z0-9._-]*", re.IGNORECASE)
_VERSION = re.compile(r"[0-9a-f]{64}")
_WEIGHTS_NAME = re.compile(r"\.(safetensors|tar|tar\.gz|tgz)\b", re.IGNORECASE)
_WEIGHTS_PATH = re.compile(r"\.(safetensors|tar|tar\.gz|tgz)/*$", re.IGNORECASE)
_PROMPT_SYNTAX = re.compile(r"[<(\[]")  # <lora:name:0.8>, (name:1.2), [name]; no link begins so
_AIR = re.compile(
    r"(?:urn:)?(?:(?:air:)(?=.*:.*:)|(?=[^/]+:civitai:|[^/]+:huggingface:))"
    r"(?P<ecosystem>\w+):(?P<kind>\w+):(?P<source>\w+):(?P<id>[^@+:]+)"
    r"(?:@(?P<version>[^@+:]+?))?(?:\+(?P<file>\d+))?(?:\.safetensors)?",
    re.IGNORECASE,
)
_AIR_KINDS = ("lora", "lycoris", "locon", "dora")
_HF_HOSTS = {"huggingface.co", "hf.co"}
_HF_VIEWS = {"blob", "resolve", "raw", "tree"}
_HF_OTHER = {"datasets", "spaces", "collections", "papers", "docs", "models"}
_CIVITAI_HOSTS = {"civitai.com", "civitai.red", "civitai.green"}
_REPLICATE_TABS = {"api", "playground", "examples", "readme", "versions", "train"}


def parse_reference(text: str, *, allow_local_paths: bool = False) -> Reference:
    """Read a reference as users write it; raises ReferenceFormatError with the accepted forms."""
    text = text.strip()
    if text[:5].lower() == "data:":
        return _data(text)
    if text.startswith(("/", "./", "../", "~")) or text[:5].lower() == "file:":
        return _local(text, allow_local_paths)
    if _PROMPT_SYNTAX.match(text):
        raise _not_understood(text, "this is prompt syntax, and a link to the LoRA is needed")
    if re.search(r"\s", text):
        raise _not_understood(text, "it contains spaces")
    if found := _AIR.fullmatch(text):
        return _air(text, found)
    if text.lower().startswith(("urn:air:", "air:")):
        raise _not_understood(text, "an AIR is written urn:air:flux1:lora:civitai:MODEL@VERSION")
    if text[:3].lower() == "hf:":
        return _hf(text)
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
    query = parse_qs(parts.query)
    if host in _HF_HOSTS and not downloaded:
        return _hugging_face(text, segments, query.get("show_file_info", [""])[0])
    if host in _CIVITAI_HOSTS:
        return _civitai(text, segments, query)
    if host == "replicate.com":
        return _replicate(text, _without_tabs(segments))
    is_weights = _WEIGHTS_PATH.search(parts.path) or _WEIGHTS_NAME.search(unquote(parts.query))
    if (named_scheme or "." in host) and is_weights:
        return UrlReference(parts._replace(fragment="").geturl())
    if named_scheme:
        raise _not_understood(text, "the URL does not name a .safetensors or .tar file")
    return _replicate(text, text.partition("?")[0].split("/"))


def _without_tabs(segments: list[str]) -> list[str]:
    """The address of a page on Replicate, without the tab that is open on it.

    `.../owner/name/api/schema` is the page of owner/name; `.../versions/VERSION/api` of a version.
    """
    for place, segment in enumerate(segments):
        is_version = segment == "versions" and len(segments) > place + 1
        if place >= 2 and segment in _REPLICATE_TABS and not is_version:
            return segments[:place]
    return segments


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


def _hf(text: str) -> HuggingFaceReference:
    """`hf:owner/name` and `hf://owner/name[@revision][/file]`, as huggingface_hub writes them."""
    segments = [segment for segment in unquote(text[3:]).split("/") if segment]
    if len(segments) >= 2 and "@" in segments[1]:
        segments[1], _, revision = segments[1].partition("@")
        segments[2:2] = ["blob" if segments[2:] else "tree", revision]
    return _hugging_face(text, segments, "")


def _hugging_face(text: str, segments: list[str], shown: str) -> HuggingFaceReference:
    """shown: the file that the page's address shows (`?show_file_info=`), if any."""
    if segments and segments[0] in _HF_OTHER:
        raise _not_understood(text, "of anything but a model, give the download link of a file")
    if len(segments) < 2 or not all(_SLUG.fullmatch(part) for part in segments[:2]):
        raise _not_understood(text, "a repository is written huggingface.co/owner/name")
    repo, rest = "/".join(segments[:2]), segments[2:]
    if any(part in ("..", ".") for part in [*rest, *shown.split("/")]):
        raise _not_understood(text)
    if shown:
        rest = ["blob", *(rest[1:2] if rest[:1] == ["tree"] else ["main"]), *shown.split("/")]
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


def _air(text: str, found: re.Match[str]) -> CivitaiReference | HuggingFaceReference:
    """An identifier as CivitAI's copy button gives it (AIR, the AI Resource identifier)."""
    ecosystem, kind, source = (found[name].lower() for name in ("ecosystem", "kind", "source"))
    if ecosystem != "flux1":
        raise _not_understood(text, f"it is for {ecosystem}, and adapters for flux1 are read")
    if kind not in _AIR_KINDS:
        kinds = ", ".join(_AIR_KINDS)
        raise _not_understood(text, f"it is of type {kind}, and adapters are of type {kinds}")
    name, version, file = found["id"], found["version"], found["file"]
    if source == "civitai":
        return CivitaiReference(
            _number(text, name.removesuffix(".safetensors")),
            _number(text, version) if version else None,
            file=_number(text, file) if file else None,
        )
    if source == "huggingface":
        segments = name.split("/")
        if len(segments) == 2:  # the format stands behind the identifier, and names no file
            segments[1] = segments[1].removesuffix(".safetensors")
        if version:
            segments[2:2] = ["blob" if segments[2:] else "tree", version]
        return _hugging_face(text, segments, "")
    raise _not_understood(text, f"{source} is not a source; civitai and huggingface are")


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
