"""Adapters on CivitAI, through its API.

A page has the number of a model, a download the number of one version of it; mixing them up
fetches somebody else's file.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

from lora.sources.air import read_air
from lora.sources.link import Link
from lora.sources.reference import Access, Reference, fingerprint
from lora.sources.url import UrlArtifact
from weights.download.http import HttpClient
from weights.download.remote import Credential, Remote
from weights.download.retry import RetryPolicy
from weights.serving.errors import NotFoundError, SourceUnavailableError, WeightsError
from weights.serving.redact import one_line
from weights.serving.settings import Settings

logger = logging.getLogger(__name__)

BASE_MODEL = "Flux.1"
EXACT = (f"{BASE_MODEL} D", f"{BASE_MODEL} S")  # dev and schnell; others are kin, as Krea
OTHER_SITES = {Settings.civitai_endpoint: ("https://civitai.red",)}  # a mirror stands for all
HOSTS = {"civitai.com", "civitai.red", "civitai.green"}
TYPES = ("Model", "Pruned Model")  # of files that may be adapters
MENU = ("type", "format", "size", "fp")
MAX_LISTED = 10

Json = Mapping[str, Any]


@dataclass(frozen=True)
class CivitaiReference(Reference):
    """A model page or a version on CivitAI. Both have numbers, which are not the same ones.

    CivitAI is several sites (civitai.com, .red and once .green) with the same numbers.

    Attributes:
        token: one that the user put into the link.
        file: one of several in a version, by its number.
        wanted: what the menu of downloads says of a file: its type, or keys of its metadata.
    """

    model: int | None = None
    version: int | None = None
    token: str | None = field(default=None, repr=False)
    file: int | None = None
    wanted: tuple[tuple[str, str], ...] = ()

    forms = (
        "civitai.com/models/123 or civitai.com/models/123?modelVersionId=456",
        "urn:air:flux1:lora:civitai:123@456                          CivitAI's own identifier",
    )

    @classmethod
    def parse(cls, link: Link) -> Self | None:
        if air := read_air(link):
            if air.source != "civitai":
                return None
            return cls(
                _number(link, air.id.removesuffix(".safetensors")),
                _number(link, air.version) if air.version else None,
                file=_number(link, air.file) if air.file else None,
            )
        if link.url.host not in HOSTS:
            return None
        query = {name: values[0] for name, values in link.url.query.items()}
        token, asked, file = map(query.get, ("token", "modelVersionId", "fileId"))
        chosen = None if file is None else _number(link, file)
        match link.url.segments:
            case ["api", "download", "models", number, *_]:
                wanted = tuple((name, query[name]) for name in MENU if name in query)
                return cls(None, _number(link, number), token, chosen, wanted)
            case ["model-versions", number] | ["api", "v1", "model-versions", number]:
                return cls(None, _number(link, number), token, chosen)
            case ["models", number, *_] | ["api", "v1", "models", number]:
                version = None if asked is None else _number(link, asked)
                return cls(_number(link, number), version, token, chosen)
        raise link.refused("a CivitAI page is written civitai.com/models/123")

    @property
    def display(self) -> str:
        file = f" file {self.file}" if self.file else ""
        if self.model is None:
            return f"civitai.com/api/download/models/{self.version}{file}"
        version = f"?modelVersionId={self.version}" if self.version else ""
        return f"civitai.com/models/{self.model}{version}{file}"

    @property
    def key(self) -> str:
        """Identity, with the token: what one token may see is not for another."""
        return " ".join(map(str, (self.display, *self.wanted, self.token or "")))

    @property
    def immutable(self) -> bool:
        return self.version is not None

    def credential(self, settings: Settings) -> Credential:
        return Credential(
            "CIVITAI_API_TOKEN",
            settings.civitai_endpoint,
            self.token or settings.civitai_token,
            OTHER_SITES.get(settings.civitai_endpoint, ()),
        )

    def resolve(self, access: Access, retry: RetryPolicy) -> UrlArtifact:
        """Ask CivitAI which file is meant: its version, download URL and SHA-256."""
        credential = self.credential(access.settings)

        def ask(path: str) -> Json:
            return _ask(self, path, credential, access.client, retry)

        if self.version is None:
            version = _newest(self, ask(f"models/{self.model}"))
        else:
            version = _named(self, ask)
        return _artifact(self, version, credential)


def _number(link: Link, digits: str) -> int:
    if not (digits.isascii() and digits.isdigit() and len(digits) < 16):
        raise link.refused("models and versions on CivitAI have numbers")
    return int(digits)


def _ask(
    reference: CivitaiReference,
    path: str,
    credential: Credential,
    client: HttpClient,
    retry: RetryPolicy,
) -> Json:
    """The answer of the API; what the first site does not have is asked for at the next.

    CivitAI shows each of its sites a part of the same models.
    """
    missing: NotFoundError | None = None
    for site in (credential.origin, *credential.others):
        remote = Remote(f"{site}/api/v1/{path}", reference.display, credential)
        tries = retry if missing is None else replace(retry, attempts=1)
        try:
            answer = client.get_json(remote, tries)
            if isinstance(answer, dict):
                return answer
            raise _unreadable(reference)
        except NotFoundError as error:
            missing = missing or error
        except SourceUnavailableError:
            if missing is None:
                raise
    assert missing is not None
    raise missing


def _newest(reference: CivitaiReference, model: Json) -> Json:
    """The newest version for FLUX.1 of a model that may also have versions for others."""
    _refuse_checkpoint(reference, model.get("type"))
    versions = list(_dicts(model.get("modelVersions")))
    kin = [v for v in versions if str(v.get("baseModel", "")).startswith(BASE_MODEL)]
    for version in kin:
        if version["baseModel"] in EXACT:
            return version
    if kin:
        logger.warning(
            "%s is made for %s; it may not look as intended with FLUX.1 [dev] or [schnell].",
            reference.display,
            one_line(str(kin[0]["baseModel"])),
        )
        return kin[0]
    made_for = ", ".join(dict.fromkeys(str(v.get("baseModel")) for v in versions)) or "nothing"
    raise NotFoundError(
        f"{reference.display}: no version of this model is for {BASE_MODEL}; it is made for "
        f"{made_for}. Choose a LoRA for {BASE_MODEL}."
    )


def _named(reference: CivitaiReference, ask: Callable[[str], Json]) -> Json:
    try:
        version = ask(f"model-versions/{reference.version}")
    except NotFoundError as error:
        raise NotFoundError(
            f"{error} {reference.version} must be the number of a version; for the number of a "
            f"model write civitai.com/models/{reference.version}"
        ) from error
    model = version.get("modelId")
    if reference.model is not None and model != reference.model:
        raise NotFoundError(
            f"{reference.display}: version {reference.version} belongs to model {model}. "
            f"Write civitai.com/models/{model}?modelVersionId={reference.version}"
        )
    about = version.get("model")
    _refuse_checkpoint(reference, about.get("type") if isinstance(about, dict) else None)
    return version


def _refuse_checkpoint(reference: CivitaiReference, kind: object) -> None:
    if kind == "Checkpoint":
        raise WeightsError(f"{reference.display}: this is a whole checkpoint. Choose a LoRA.")


def _artifact(reference: CivitaiReference, version: Json, credential: Credential) -> UrlArtifact:
    file = _file(reference, version)
    number, size, url = version.get("id"), file.get("sizeKB"), file.get("downloadUrl")
    hashes = file.get("hashes")
    sha256 = hashes.get("SHA256") if isinstance(hashes, dict) else None
    if not isinstance(url, str) or not isinstance(number, int):
        raise _unreadable(reference)
    words = version.get("trainedWords")
    owner = fingerprint(credential.token)
    return UrlArtifact(
        pin=f"civitai {credential.origin} {number} {url} {sha256} {owner}",
        source=reference.display,
        revision=f"version {number}",
        remote=Remote(url, reference.display, credential),
        size=int(size * 1024) if isinstance(size, int | float) else None,
        sha256=sha256.lower() if isinstance(sha256, str) else None,
        trigger_words=tuple(str(word) for word in words) if isinstance(words, list) else (),
    )


def _file(reference: CivitaiReference, version: Json) -> Json:
    """The file of a version that holds the weights: the one asked for, else the primary one."""
    files = list(_dicts(version.get("files")))
    usable = [file for file in files if file.get("type") in TYPES and _is_safetensors(file)]
    if reference.file is not None:
        named = [file for file in usable if file.get("id") == reference.file]
        if not named:
            listed = ", ".join(f"{file.get('id')} ({file.get('name')})" for file in usable)
            raise NotFoundError(
                f"{reference.display}: the version has no such .safetensors file. It has "
                f"{listed or 'none'}; leave out the number of the file for the main one."
            )
        usable = named
    if usable:
        return max(usable, key=partial(_rank, reference.wanted))
    names = ", ".join(str(file.get("name")) for file in files[:MAX_LISTED]) or "no files"
    raise NotFoundError(
        f"{reference.display}: the version holds no .safetensors model, only {names}. "
        f"Choose another version."
    )


def _rank(wanted: Sequence[tuple[str, str]], file: Json) -> tuple[int, bool, bool]:
    """The higher the more a file is what is wanted, or the main one."""
    metadata = file.get("metadata")
    said = {**(metadata if isinstance(metadata, dict) else {}), "type": file.get("type")}
    fits = sum(str(said.get(name)).lower() == value.lower() for name, value in wanted)
    return fits, file.get("primary") is True, file.get("type") == TYPES[0]


def _is_safetensors(file: Json) -> bool:
    metadata = file.get("metadata")
    told = metadata.get("format") if isinstance(metadata, dict) else None
    return told == "SafeTensor" or (
        told is None and str(file.get("name", "")).lower().endswith(".safetensors")
    )


def _dicts(value: object) -> Iterator[Json]:
    if isinstance(value, list):
        yield from (item for item in value if isinstance(item, dict))


def _unreadable(reference: CivitaiReference) -> SourceUnavailableError:
    return SourceUnavailableError(
        f"{reference.display}: CivitAI answered in a form that is not understood. Try again later."
    )
