"""Where adapters come from: one module for each source."""

from lora.sources.civitai import CivitaiReference
from lora.sources.data import DataReference
from lora.sources.huggingface import HuggingFaceReference
from lora.sources.link import Link
from lora.sources.local import LocalReference
from lora.sources.reference import Reference
from lora.sources.replicate import ReplicateReference
from lora.sources.url import UrlReference
from weights.serving.errors import ReferenceFormatError

SOURCES: tuple[type[Reference], ...] = (
    DataReference,
    LocalReference,  # these two before those that read a link as a URL
    HuggingFaceReference,
    CivitaiReference,
    UrlReference,
    ReplicateReference,  # takes what no other takes
)


def parse_reference(text: str, *, allow_local_paths: bool = False) -> Reference:
    """Read a reference as users write it.

    Raises:
        ReferenceFormatError: with the forms that are accepted.
    """
    link = Link(text.strip(), allow_local_paths)
    try:
        for source in SOURCES:
            if found := source.parse(link):
                return found
        raise link.refused()
    except ReferenceFormatError as error:
        forms = "\n".join(f"  {line}" for source in reversed(SOURCES) for line in source.forms)
        raise ReferenceFormatError(f"{error}. Accepted:\n{forms}") from error
