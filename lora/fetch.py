"""From an artifact to a .safetensors file on this disk."""

import logging
from pathlib import Path

from lora.archive import kind_of, take_weights
from lora.sources.reference import Access, Artifact, FetchedFile
from weights.download.retry import RetryPolicy
from weights.download.transfer import LogProgress, sha256_of

logger = logging.getLogger(__name__)


def fetch_file(artifact: Artifact, target: Path, access: Access, retry: RetryPolicy) -> FetchedFile:
    """Fetch the file of an artifact, and take it out of its archive if it is in one.

    Args:
        target: where to put a file that is not already kept by somebody else.

    Raises:
        WeightsError: nothing but an unfinished download is then left at `target`.
    """
    size = f" ({artifact.size / 1e6:.1f} MB)" if artifact.size else ""
    logger.info("Fetching %s%s", artifact.source, size)
    fetched = artifact.fetch(target, access, retry, LogProgress(artifact.source))
    is_weights = False
    try:
        is_weights = kind_of(fetched.path, artifact.source) == "safetensors"
        if is_weights:
            return fetched
        limit = access.client.settings.max_bytes
        inner = target.with_name(target.name + ".inner")
        words, settings = take_weights(
            fetched.path, inner, artifact.source, limit, retry.check_cancelled
        )
        return FetchedFile(inner, sha256_of(inner), trigger_words=words, settings=settings)
    finally:
        if not is_weights and not fetched.in_place:
            fetched.path.unlink(missing_ok=True)
