"""Adapters that were trained on Replicate: a tar behind the page of each fine-tune."""

import re
from dataclasses import dataclass, replace
from typing import Self

from lora.sources.link import SLUG, Link
from lora.sources.reference import Access, Reference, fingerprint
from lora.sources.url import UrlArtifact, probe
from weights.download.remote import Credential, Remote
from weights.download.retry import RetryPolicy
from weights.serving.errors import InvalidFileError, NotFoundError
from weights.serving.settings import Settings

VERSION = re.compile(r"[0-9a-f]{64}")
TABS = {"api", "playground", "examples", "readme", "versions", "train"}


@dataclass(frozen=True)
class ReplicateReference(Reference):
    """A fine-tune on Replicate; without a version, the newest."""

    owner: str
    name: str
    version: str | None = None

    forms = (
        "owner/name, owner/name/version or owner/name:version        a fine-tune on Replicate",
    )

    @classmethod
    def parse(cls, link: Link) -> Self:
        """Read a page of replicate.com, or whatever looks like no URL."""
        if link.url.host == "replicate.com":
            segments = _without_tabs(link.url.segments)
        else:
            segments = [part for part in link.text.partition("?")[0].split("/") if part]
        if len(segments) >= 2 and ":" in segments[1]:
            segments[1:2] = segments[1].split(":", 1)
        segments = [part.lower() for part in segments if part not in ("versions", "_weights", "")]
        if len(segments) not in (2, 3):
            raise link.refused()
        owner, name, *version = segments
        if not all(SLUG.fullmatch(part) for part in (owner, name)):
            raise link.refused()
        if version and not VERSION.fullmatch(version[0]):
            raise link.refused("a version on Replicate has 64 hexadecimal digits")
        return cls(owner, name, *version)

    @property
    def display(self) -> str:
        version = f":{self.version}" if self.version else ""
        return f"replicate.com/{self.owner}/{self.name}{version}"

    @property
    def immutable(self) -> bool:
        return self.version is not None

    def credential(self, settings: Settings) -> Credential:
        return Credential(
            "REPLICATE_API_TOKEN", settings.replicate_endpoint, settings.replicate_token
        )

    def resolve(self, access: Access, retry: RetryPolicy) -> UrlArtifact:
        credential = self.credential(access.settings)
        version = f"/versions/{self.version}" if self.version else ""
        url = f"{credential.origin}/{self.owner}/{self.name}{version}/_weights"
        try:
            artifact = probe(Remote(url, self.display, credential), url, access, retry)
        except (NotFoundError, InvalidFileError) as error:
            raise NotFoundError(
                f"{self.display}: Replicate offers no weights under this name. Check the "
                f"spelling, and that it is a public FLUX fine-tune. If it is on Hugging Face, "
                f"write huggingface.co/{self.owner}/{self.name}"
            ) from error
        pin = artifact.pin
        if self.version is not None:
            artifact = replace(artifact, revision=self.version[:12])
            pin = f"replicate {url}"
        return replace(artifact, pin=pin and f"{pin} {fingerprint(credential.token)}")


def _without_tabs(segments: list[str]) -> list[str]:
    """The address of a page on Replicate, without the tab that is open on it.

    `.../owner/name/api/schema` is the page of owner/name; `.../versions/VERSION/api` of a version.
    """
    for place, segment in enumerate(segments):
        is_version = segment == "versions" and len(segments) > place + 1
        if place >= 2 and segment in TABS and not is_version:
            return segments[:place]
    return segments
