"""From an artifact to a .safetensors file on this disk."""

import logging
from pathlib import Path

from lora import huggingface
from lora.archive import kind_of, take_weights
from lora.artifact import Artifact, Fetched, HubFile
from lora.sources import Sources
from weights.download import Expected, LogProgress, download, sha256_of
from weights.http import Remote
from weights.retry import RetryPolicy

logger = logging.getLogger(__name__)


def fetch(artifact: Artifact, target: Path, sources: Sources, retry: RetryPolicy) -> Fetched:
    """Download the file of an artifact, and take it out of its archive if it is in one.

    target: where to put a file that is not already kept by somebody else.
    Raises WeightsError; nothing but an unfinished download is then left at `target`.
    """
    size = f" ({artifact.size / 1e6:.1f} MB)" if artifact.size else ""
    logger.info("Fetching %s%s.", artifact.source, size)
    progress = LogProgress(artifact.source)
    match artifact.location:
        case HubFile():
            fetched = huggingface.download(
                artifact, artifact.location, sources.settings, retry, progress
            )
        case Remote():
            expected = Expected(
                sha256=artifact.sha256,
                validator=artifact.validator,
                size=artifact.size if artifact.validator else None,
            )
            digest = download(
                sources.client,
                artifact.location,
                target,
                expected=expected,
                retry=retry,
                on_progress=progress,
            )
            fetched = Fetched(target, digest)
        case Path():
            path = artifact.location
            fetched = Fetched(path, sha256_of(path), in_place=True, evictable=False)
        case bytes():
            target.write_bytes(artifact.location)
            fetched = Fetched(target, sha256_of(target))
    return _opened(fetched, target, artifact.source, sources, retry)


def _opened(
    fetched: Fetched, target: Path, name: str, sources: Sources, retry: RetryPolicy
) -> Fetched:
    """Take the weights out of an archive; a file that is none passes as it is."""
    is_weights = False
    try:
        is_weights = kind_of(fetched.path, name) == "safetensors"
        if is_weights:
            return fetched
        inner = target.with_name(target.name + ".inner")
        limit = sources.client.settings.max_bytes
        words = take_weights(fetched.path, inner, name, limit, retry.check_cancelled)
        return Fetched(inner, sha256_of(inner), trigger_words=words)
    finally:
        if not is_weights and not fetched.in_place:
            fetched.path.unlink(missing_ok=True)
