"""Adapters on CivitAI, through its API.

A page has the number of a model, a download the number of one version of it; mixing them up
fetches somebody else's file.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lora.artifact import Artifact
from lora.reference import CivitaiReference
from weights.errors import NotFoundError, SourceUnavailableError, WeightsError
from weights.http import Credential, HttpClient, Remote
from weights.redact import one_line
from weights.retry import RetryPolicy

logger = logging.getLogger(__name__)

_BASE_MODEL = "Flux.1"
_EXACT = (f"{_BASE_MODEL} D", f"{_BASE_MODEL} S")  # dev and schnell; others are kin, as Krea
_MAX_LISTED = 10

Json = Mapping[str, Any]


def resolve(
    reference: CivitaiReference, credential: Credential, client: HttpClient, retry: RetryPolicy
) -> Artifact:
    """Ask CivitAI which file a reference means: its version, download URL and SHA-256.

    What the first site of the credential does not have is asked for at the next: CivitAI shows
    each of its sites a part of the same models.
    """

    def ask(path: str) -> Json:
        missing: NotFoundError | None = None
        for site in (credential.origin, *credential.others):
            try:
                return ask_site(site, path)
            except NotFoundError as error:
                missing = missing or error
            except SourceUnavailableError:
                if missing is None:
                    raise
        assert missing is not None
        raise missing

    def ask_site(site: str, path: str) -> Json:
        remote = Remote(f"{site}/api/v1/{path}", reference.display, credential)
        answer = client.get_json(remote, retry)
        if not isinstance(answer, dict):
            raise _unreadable(reference)
        return answer

    if reference.version is None:
        version = _newest(reference, ask(f"models/{reference.model}"))
    else:
        version = _named(reference, ask)
    return _artifact(reference, version, credential)


def _newest(reference: CivitaiReference, model: Json) -> Json:
    """The newest version for FLUX.1 of a model that may also have versions for others."""
    _refuse_checkpoint(reference, model.get("type"))
    versions = list(_dicts(model.get("modelVersions")))
    kin = [v for v in versions if str(v.get("baseModel", "")).startswith(_BASE_MODEL)]
    for version in kin:
        if version["baseModel"] in _EXACT:
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
        f"{reference.display}: no version of this model is for {_BASE_MODEL}; it is made for "
        f"{made_for}. Choose a LoRA for {_BASE_MODEL}."
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


def _artifact(reference: CivitaiReference, version: Json, credential: Credential) -> Artifact:
    file = _file(reference, version)
    number, size, url = version.get("id"), file.get("sizeKB"), file.get("downloadUrl")
    hashes = file.get("hashes")
    sha256 = hashes.get("SHA256") if isinstance(hashes, dict) else None
    if not isinstance(url, str) or not isinstance(number, int):
        raise _unreadable(reference)
    words = version.get("trainedWords")
    return Artifact(
        pin=f"civitai {credential.origin} {number} {url} {sha256}",
        source=reference.display,
        revision=f"version {number}",
        location=Remote(url, reference.display, credential),
        size=int(size * 1024) if isinstance(size, int | float) else None,
        sha256=sha256.lower() if isinstance(sha256, str) else None,
        trigger_words=tuple(str(word) for word in words) if isinstance(words, list) else (),
    )


def _file(reference: CivitaiReference, version: Json) -> Json:
    """The file of a version that holds the weights: the one asked for, else the primary one."""
    files = list(_dicts(version.get("files")))
    usable = [file for file in files if file.get("type") == "Model" and _is_safetensors(file)]
    if reference.file is not None:
        named = [file for file in usable if file.get("id") == reference.file]
        if not named:
            listed = ", ".join(f"{file.get('id')} ({file.get('name')})" for file in usable)
            raise NotFoundError(
                f"{reference.display}: the version has no such .safetensors file. It has "
                f"{listed or 'none'}; leave out the + and the number for the main one."
            )
        usable = named
    if usable:
        return max(usable, key=lambda file: file.get("primary") is True)
    names = ", ".join(str(file.get("name")) for file in files[:_MAX_LISTED]) or "no files"
    raise NotFoundError(
        f"{reference.display}: the version holds no .safetensors model, only {names}. "
        f"Choose another version."
    )


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
