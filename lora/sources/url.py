"""Adapters behind any URL, and what all sources of files behind URLs share."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from lora.sources.link import Link
from lora.sources.reference import Access, Artifact, FetchedFile, Reference
from weights.download.remote import Remote
from weights.download.retry import RetryPolicy
from weights.download.transfer import Expected, Progress, download
from weights.serving.errors import InvalidFileError
from weights.serving.redact import one_line, without_secrets

WEIGHTS_NAME = re.compile(r"\.(safetensors|tar|tar\.gz|tgz)\b", re.IGNORECASE)
WEIGHTS_PATH = re.compile(r"\.(safetensors|tar|tar\.gz|tgz)/*$", re.IGNORECASE)
GITHUB_PAGE = re.compile(r"^(/[^/]+/[^/]+)/blob/")  # of a file: /owner/name/blob/branch/path
SIGNING_PREFIXES = ("x-amz-", "x-goog-")
SIGNING = {
    *("awsaccesskeyid", "googleaccessid", "signature", "expires", "policy", "key-pair-id"),
    *("sig", "se", "st", "sp", "sv", "sr", "spr", "skoid", "sktid", "skt", "ske", "sks", "skv"),
    "token",
}


@dataclass(frozen=True)
class UrlReference(Reference):
    """A file behind a URL, whose query and user part may be secrets."""

    url: str = field(repr=False)

    forms = ("https://host/path/file.safetensors or https://host/path/file.tar",)

    @classmethod
    def parse(cls, link: Link) -> Self | None:
        url = link.url
        if url.host == "replicate.com":
            return None
        is_weights = WEIGHTS_PATH.search(url.path) or WEIGHTS_NAME.search(unquote(url.raw_query))
        if (url.named_scheme or "." in url.host) and is_weights:
            return cls(_shared(url.full, url.host))
        if url.named_scheme:
            raise link.refused("the URL does not name a .safetensors or .tar file")
        return None

    @property
    def display(self) -> str:
        """The URL without user, query and fragment."""
        return without_secrets(self.url)

    @property
    def key(self) -> str:
        """The whole URL: another signature may not see what this one may."""
        return self.url

    @property
    def lasting(self) -> bool:
        return not any(_signs(name) for name, _ in parse_qsl(urlsplit(self.url).query))

    def resolve(self, access: Access, retry: RetryPolicy) -> "UrlArtifact":
        return probe(Remote(self.url, self.display), unsigned(self.url), access, retry)


@dataclass(frozen=True, kw_only=True)
class UrlArtifact(Artifact):
    """A file behind a URL.

    Attributes:
        validator: ETag or Last-Modified date, which the file must still have when it is fetched.
    """

    remote: Remote
    validator: str | None = None

    def fetch(
        self, target: Path, access: Access, retry: RetryPolicy, on_progress: Progress
    ) -> FetchedFile:
        expected = Expected(
            sha256=self.sha256,
            validator=self.validator,
            size=self.size if self.validator else None,
        )
        digest = download(
            access.client,
            self.remote,
            target,
            expected=expected,
            retry=retry,
            on_progress=on_progress,
        )
        return FetchedFile(target, digest)


def probe(remote: Remote, identity: str, access: Access, retry: RetryPolicy) -> UrlArtifact:
    """Ask what is behind a URL, without its content.

    Args:
        identity: what says which file is meant, for the pin.

    Raises:
        WeightsError: it does not answer, or is a web page.
    """
    answer = access.client.probe(remote, retry)
    if answer.content_type in ("text/html", "application/xhtml+xml"):
        raise InvalidFileError(
            f"{remote.name}: this is a web page, not a file with weights. Give the link of the "
            f"file itself: the one behind the download button."
        )
    return UrlArtifact(
        pin=f"url {identity} {answer.validator}" if answer.validator else None,
        source=remote.name,
        revision=one_line((answer.validator or "unknown").strip('"')),
        remote=remote,
        size=answer.size,
        validator=answer.validator,
    )


def _shared(url: str, host: str) -> str:
    """The file behind a link that a site's button for sharing gives, which is that of a page."""
    parts = urlsplit(url)
    if host == "github.com":
        return parts._replace(path=GITHUB_PAGE.sub(r"\1/raw/", parts.path)).geturl()
    if host == "dropbox.com":
        others = [(k, v) for k, v in parse_qsl(parts.query, keep_blank_values=True) if k != "dl"]
        return parts._replace(query=urlencode([*others, ("dl", "1")])).geturl()
    return url


def unsigned(url: str) -> str:
    """A URL without its user part, fragment and presigning parameters.

    What is left says which file is meant: a link signed anew leads to the same one.
    """
    parts = urlsplit(url)
    kept = [(k, v) for k, v in parse_qsl(parts.query, keep_blank_values=True) if not _signs(k)]
    host = parts.netloc.rpartition("@")[2].lower()
    return parts._replace(netloc=host, query=urlencode(kept), fragment="").geturl()


def _signs(parameter: str) -> bool:
    name = parameter.lower()
    return name in SIGNING or name.startswith(SIGNING_PREFIXES)
