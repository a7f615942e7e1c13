"""From a reference to the exact file it means now: a revision, a hash, a place to fetch it from."""

import hashlib
from dataclasses import replace
from urllib.parse import parse_qsl, urlencode, urlsplit

from lora import civitai, huggingface
from lora.artifact import Artifact
from lora.reference import (
    CivitaiReference,
    DataReference,
    HuggingFaceReference,
    LocalReference,
    Reference,
    ReplicateReference,
    UrlReference,
)
from lora.settings import SourceSettings
from weights.errors import InvalidFileError, NotFoundError
from weights.http import Credential, HttpClient, Remote
from weights.redact import one_line
from weights.retry import RetryPolicy

_SIGNING_PREFIXES = ("x-amz-", "x-goog-")
_SIGNING = {
    *("awsaccesskeyid", "googleaccessid", "signature", "expires", "policy", "key-pair-id"),
    *("sig", "se", "st", "sp", "sv", "sr", "spr", "skoid", "sktid", "skt", "ske", "sks", "skv"),
    "token",
}


class Sources:
    """The places where adapters live, with the operator's tokens for them."""

    def __init__(self, settings: SourceSettings, client: HttpClient) -> None:
        self.settings = settings
        self.client = client

    def key(self, reference: Reference) -> str:
        """Identity of a reference in a cache: what one token sees is not for another."""
        match reference:
            case HuggingFaceReference():
                secret, place = self.settings.hf_token, self.settings.hf_endpoint
            case CivitaiReference():
                secret, place = self.settings.civitai_token, self.settings.civitai_endpoint
            case ReplicateReference():
                secret, place = self.settings.replicate_token, self.settings.replicate_endpoint
            case _:
                secret, place = None, ""
        return f"{type(reference).__name__} {reference.key} {place} {_fingerprint(secret)}"

    def resolve(self, reference: Reference, retry: RetryPolicy) -> Artifact:
        """Find out what a reference is at this moment; raises WeightsError."""
        match reference:
            case HuggingFaceReference():
                artifact = huggingface.resolve(reference, self.settings)
                secret = self.settings.hf_token
            case CivitaiReference():
                credential = self._civitai(reference)
                artifact = civitai.resolve(reference, credential, self.client, retry)
                secret = credential.token
            case ReplicateReference():
                artifact = self._replicate(reference, retry)
                secret = self.settings.replicate_token
            case UrlReference():
                return self._url(reference, retry)
            case DataReference():
                return _data(reference)
            case LocalReference():
                return _local(reference)
        return _seen_with(secret, artifact)

    def _civitai(self, reference: CivitaiReference) -> Credential:
        token = reference.token or self.settings.civitai_token
        endpoint, others = self.settings.civitai_endpoint, self.settings.civitai_others
        return Credential("CIVITAI_API_TOKEN", endpoint, token, others)

    def _replicate(self, reference: ReplicateReference, retry: RetryPolicy) -> Artifact:
        endpoint = self.settings.replicate_endpoint
        version = f"/versions/{reference.version}" if reference.version else ""
        url = f"{endpoint}/{reference.owner}/{reference.name}{version}/_weights"
        credential = Credential("REPLICATE_API_TOKEN", endpoint, self.settings.replicate_token)
        try:
            artifact = self._probe(Remote(url, reference.display, credential), url, retry)
        except (NotFoundError, InvalidFileError) as error:
            raise NotFoundError(
                f"{reference.display}: Replicate offers no weights under this name. Check the "
                f"spelling, and that it is a public FLUX fine-tune. If it is on Hugging Face, "
                f"write huggingface.co/{reference.owner}/{reference.name}"
            ) from error
        if reference.version is None:
            return artifact
        return replace(artifact, pin=f"replicate {url}", revision=reference.version[:12])

    def _url(self, reference: UrlReference, retry: RetryPolicy) -> Artifact:
        remote = Remote(reference.url, reference.display)
        return self._probe(remote, unsigned(reference.url), retry)

    def _probe(self, remote: Remote, identity: str, retry: RetryPolicy) -> Artifact:
        probe = self.client.probe(remote, retry)
        if probe.content_type in ("text/html", "application/xhtml+xml"):
            raise InvalidFileError(
                f"{remote.name}: this is a web page, not a file with weights. Give the link of the "
                f"file itself: the one behind the download button."
            )
        return Artifact(
            pin=f"url {identity} {probe.validator}" if probe.validator else None,
            source=remote.name,
            revision=one_line((probe.validator or "unknown").strip('"')),
            location=remote,
            size=probe.size,
            validator=probe.validator,
        )


def unsigned(url: str) -> str:
    """A URL without its user part, fragment and presigning parameters.

    What is left says which file is meant: a link signed anew leads to the same one.
    """
    parts = urlsplit(url)
    kept = [(k, v) for k, v in parse_qsl(parts.query, keep_blank_values=True) if not _signs(k)]
    host = parts.netloc.rpartition("@")[2].lower()
    return parts._replace(netloc=host, query=urlencode(kept), fragment="").geturl()


def is_presigned(reference: Reference) -> bool:
    """Whether a reference is a URL that carries its own permission: soon nobody sends it again."""
    return isinstance(reference, UrlReference) and any(
        _signs(name) for name, _ in parse_qsl(urlsplit(reference.url).query)
    )


def _signs(parameter: str) -> bool:
    name = parameter.lower()
    return name in _SIGNING or name.startswith(_SIGNING_PREFIXES)


def _data(reference: DataReference) -> Artifact:
    return Artifact(
        pin=reference.key,
        source=reference.display,
        revision="inline",
        location=reference.data,
        size=len(reference.data),
    )


def _local(reference: LocalReference) -> Artifact:
    path = reference.path.resolve()
    if not path.is_file():
        raise NotFoundError(f"{reference.display}: no such file on the machine of this model.")
    stat = path.stat()
    return Artifact(
        pin=f"local {path} {stat.st_mtime_ns} {stat.st_size}",
        source=reference.display,
        revision=f"modified {stat.st_mtime_ns}",
        location=path,
        size=stat.st_size,
    )


def _fingerprint(secret: str | None) -> str:
    return hashlib.sha256(secret.encode()).hexdigest() if secret else "anonymous"


def _seen_with(secret: str | None, artifact: Artifact) -> Artifact:
    pin = None if artifact.pin is None else f"{artifact.pin} {_fingerprint(secret)}"
    return replace(artifact, pin=pin)
