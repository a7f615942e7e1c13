"""AIR, the AI Resource identifier, as the copy button of CivitAI gives it."""

import re
from dataclasses import dataclass
from functools import partial

from lora.sources.link import Link

AIR = re.compile(
    r"(?:urn:)?(?:(?:air:)(?=.*:.*:)|(?=[^/]+:civitai:|[^/]+:huggingface:))"
    r"(?P<ecosystem>\w+):(?P<kind>\w+):(?P<source>\w+):(?P<id>[^@+:]+)"
    r"(?:@(?P<version>[^@+:]+?))?(?:\+(?P<file>\d+))?(?:\.safetensors)?",
    re.IGNORECASE,
)
KINDS = ("lora", "lycoris", "locon", "dora")
SOURCES = ("civitai", "huggingface")


@dataclass(frozen=True)
class Air:
    """An identifier of an adapter for FLUX.1."""

    source: str
    id: str
    version: str | None
    file: str | None


def read_air(link: Link) -> Air | None:
    """Read a link as an identifier; None if it is none.

    Raises:
        ReferenceFormatError: it is one, and names no adapter for FLUX.1 at one of our sources.
    """
    found = AIR.fullmatch(link.word)
    if found is None:
        if link.text.lower().startswith(("urn:air:", "air:")):
            raise link.refused("an AIR is written urn:air:flux1:lora:civitai:MODEL@VERSION")
        return None
    refused = partial(link.refused, shown=link.text)  # whole: what is before the @ is no user here
    ecosystem, kind, named = (found[name].lower() for name in ("ecosystem", "kind", "source"))
    if ecosystem != "flux1":
        raise refused(f"it is for {ecosystem}, and adapters for flux1 are read")
    if kind not in KINDS:
        raise refused(f"it is of type {kind}, and adapters are of type {', '.join(KINDS)}")
    if named not in SOURCES:
        raise refused(f"{named} is not a source; {' and '.join(SOURCES)} are")
    return Air(named, found["id"], found["version"], found["file"])
