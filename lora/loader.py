"""Load adapters by reference, through a cache of files and a cache of parsed adapters.

A reference without a version is looked up each time with one cheap request, so that a retrained
model is noticed. If its source does not answer, the cached file is used, and the log says so. A
failure leaves nothing behind: a file is recorded when it is complete, an adapter when it is parsed.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from uuid import uuid4

from lora.fetch import fetch_file
from lora.formats.errors import AdapterError
from lora.peft_config import CONFIG_NAME
from lora.settings import LoaderSettings
from lora.sources import huggingface, parse_reference
from lora.sources.reference import Access, Artifact, Reference, cache_key
from weights.download.cache import FileCache
from weights.download.http import HttpClient
from weights.download.record import CacheRecord
from weights.download.retry import RetryPolicy
from weights.download.transfer import check_size
from weights.serving.cancel import CheckCancelled, never_cancelled
from weights.serving.directories import is_full
from weights.serving.errors import DiskSpaceError, InvalidFileError, SourceUnavailableError
from weights.serving.lru import LruCache
from weights.serving.redact import one_line

if TYPE_CHECKING:
    from lora.formats.adapter import Adapter

logger = logging.getLogger(__name__)

MAX_LISTED = 5
MAX_WORDS = 10
LONG_SECONDS = 0.9  # to wait for a source that then does not answer
SILENT_SECONDS = 60.0  # in which it is not asked again for what is known
MAX_SILENT = 1000

Hit = Literal["memory", "disk", "download"]


@dataclass(frozen=True)
class LoadedAdapter:
    """A loaded adapter and its origin.

    Attributes:
        size: bytes of its file.
        hit: where it was found.
    """

    adapter: "Adapter"
    source: str
    revision: str
    size: int
    trigger_words: tuple[str, ...]
    hit: Hit

    def describe(self) -> str:
        """All of it in a line for the log."""
        ignored = list(map(one_line, self.adapter.ignored))
        names = ", ".join(ignored[:MAX_LISTED]) + (", ..." if len(ignored) > MAX_LISTED else "")
        parts = [
            self.source,
            f"revision {self.revision}",
            f"{self.size / 1e6:.1f} MB",
            f"format {self.adapter.format}",
            f"{self.adapter.modules} modules",
            f"{len(ignored)} keys ignored" + (f" ({names})" if names else ""),
            f"from {self.hit}",
        ]
        if self.trigger_words:
            parts.append(f"trigger words: {', '.join(self.trigger_words)}")
        return ", ".join(parts)


class AdapterLoader:
    """Loads adapters by reference, through a cache of files and one of parsed adapters.

    For one thread at a time; several processes may share the directory of the cache.

    Args:
        parse: reads a .safetensors file, given its path, a digest, and PEFT's settings from beside
            it; raises AdapterError.
    """

    def __init__(
        self, settings: LoaderSettings, parse: Callable[[Path, str, str], "Adapter"]
    ) -> None:
        self._settings = settings
        self._parse = parse
        self._access = Access(settings.deployment, HttpClient(settings.http))
        self._cache = FileCache(settings.cache, huggingface.remove)
        self._memory: LruCache[str, Adapter] = LruCache(settings.memory_bytes)
        # Until when the source of a reference is not asked again.
        self._silent: LruCache[str, float] = LruCache(MAX_SILENT)

    def close(self) -> None:
        """Close the connections kept open."""
        self._access.client.close()

    def load(self, text: str, check_cancelled: CheckCancelled = never_cancelled) -> LoadedAdapter:
        """Return the adapter that a reference means now.

        Args:
            check_cancelled: called before each try of a source and for each chunk of a download.

        Raises:
            WeightsError: with a message for the user.
        """
        allowed = self._settings.deployment.lora_allow_local_paths
        reference = parse_reference(text, allow_local_paths=allowed)
        retry = replace(self._settings.retry, check_cancelled=check_cancelled)
        try:
            try:
                return self._read(*self._find(reference, retry))
            except FileNotFoundError:  # evicted by another process since it was found
                return self._read(*self._find(reference, retry))
        except OSError as error:
            if not is_full(error):
                raise
            raise DiskSpaceError(
                f"{reference.display}: the disk is full. Free some space, or lower the budget of "
                "the adapter cache."
            ) from error

    def _find(self, reference: Reference, retry: RetryPolicy) -> tuple[CacheRecord, Hit]:
        """The file that a reference means now, fetched if it is not on the disk."""
        key = cache_key(reference, self._settings.deployment)
        known = self._cache.find(key)
        if known is not None and reference.immutable:
            return known, "disk"
        if known is not None and (left := (self._silent.get(key) or 0.0) - time.monotonic()) > 0:
            logger.warning(
                "Using the file from before, which may be out of date: its source did not answer, "
                "and is asked again in %.0f s",
                left,
            )
            return known, "disk"
        asked = time.monotonic()
        try:
            artifact = reference.resolve(
                self._access, retry if known is None else replace(retry, attempts=1)
            )
            record, hit = self._fetch_once(artifact, retry)
        except SourceUnavailableError as error:
            if known is None:
                raise
            if time.monotonic() - asked > LONG_SECONDS:
                self._silent.put(key, time.monotonic() + SILENT_SECONDS)
            logger.warning("Using the file from before, which may be out of date: %s", error)
            return known, "disk"
        self._cache.remember(key, replace(record, lasting=reference.lasting))
        return record, hit

    def _fetch_once(self, artifact: Artifact, retry: RetryPolicy) -> tuple[CacheRecord, Hit]:
        """Fetch an artifact unless it is on the disk; of several processes, only one does."""
        pin = artifact.pin or f"unpinned {uuid4()}"
        check_size(artifact.source, artifact.size, self._settings.http.max_bytes)
        resumable = artifact.pin is not None
        known = self._cache.find(pin)
        if known is not None:  # as it mostly is: nothing is written
            return known, "disk"
        with self._cache.fetching(pin, retry.check_cancelled, resumable=resumable) as target:
            known = self._cache.find(pin)
            if known is not None:
                return known, "disk"
            record = self._fetch(artifact, target, retry)
            if artifact.pin is not None:
                self._cache.remember(pin, record)
            return record, "download" if record.evictable else "disk"

    def _fetch(self, artifact: Artifact, target: Path, retry: RetryPolicy) -> CacheRecord:
        self._cache.make_room(*artifact.room)
        fetched = fetch_file(artifact, target, self._access, retry)
        size = fetched.path.stat().st_size
        path = str(fetched.path)
        if not fetched.in_place:
            path = self._cache.adopt(fetched.path, fetched.sha256)
        return CacheRecord(
            sha256=fetched.sha256,
            size=size,
            path=path,
            source=artifact.source + (f" with {CONFIG_NAME}" if fetched.settings else ""),
            revision=artifact.revision,
            trigger_words=_merged(artifact.trigger_words, fetched.trigger_words),
            evictable=fetched.evictable,
            settings=fetched.settings,
        )

    def _read(self, record: CacheRecord, hit: Hit) -> LoadedAdapter:
        """The adapter in a file, parsed unless it is in memory."""
        digest = _digest(record)
        adapter = self._memory.get(digest)
        if adapter is not None:
            hit = "memory" if hit == "disk" else hit
            self._cache.touch(record)
        else:
            try:
                with self._cache.in_use(record) as path:
                    adapter = self._parse(path, digest, record.settings)
            except AdapterError as error:
                raise InvalidFileError(f"{record.source}: {error}") from error
            self._memory.put(digest, adapter, adapter.nbytes)
        return LoadedAdapter(
            adapter=adapter,
            source=record.source,
            revision=record.revision,
            size=record.size,
            trigger_words=_merged(record.trigger_words, adapter.trigger_words),
            hit=hit,
        )


def _digest(record: CacheRecord) -> str:
    """What tells adapters apart: the file, and the settings beside it."""
    if not record.settings:
        return record.sha256
    return sha256(f"{record.sha256} {record.settings}".encode()).hexdigest()


def _merged(*groups: Sequence[str]) -> tuple[str, ...]:
    """All words once, in order."""
    words = (one_line(word) for group in groups for word in group)
    return tuple(dict.fromkeys(word for word in words if word))[:MAX_WORDS]
