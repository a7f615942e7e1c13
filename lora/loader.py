"""Load adapters by reference, through a cache of files and a cache of parsed adapters.

A reference without a version is looked up each time with one cheap request, so that a retrained
model is noticed. If its source does not answer, the cached file is used, and the log says so. A
failure leaves nothing behind: a file is recorded when it is complete, an adapter when it is parsed.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Generic, Literal, Protocol, Self, TypeVar
from uuid import uuid4

from lora import huggingface
from lora.artifact import Artifact
from lora.fetch import fetch
from lora.links import parse_reference
from lora.reference import Reference
from lora.settings import LoaderSettings
from lora.sources import Sources, is_presigned
from weights.cache import FileCache, Record
from weights.cancel import CheckCancelled, never_cancelled
from weights.directories import is_full
from weights.download import check_size
from weights.errors import DiskSpaceError, InvalidFileError, SourceUnavailableError
from weights.http import HttpClient
from weights.redact import one_line
from weights.retry import RetryPolicy

logger = logging.getLogger(__name__)

_MAX_LISTED = 5
_MAX_WORDS = 10

Hit = Literal["memory", "disk", "download"]


class AdapterLike(Protocol):
    """What the loader needs to know of a parsed adapter: its size, and what to log."""

    @property
    def nbytes(self) -> int:
        """Host memory it occupies, in bytes."""

    @property
    def format(self) -> str:
        """Name of the file's key format."""

    @property
    def modules(self) -> int:
        """How many modules of the model it changes."""

    @property
    def ignored(self) -> Sequence[str]:
        """Keys of the file that have no effect."""

    @property
    def trigger_words(self) -> Sequence[str]:
        """Words that its metadata says a prompt should contain."""


A = TypeVar("A", bound=AdapterLike)


@dataclass(frozen=True)
class Loaded(Generic[A]):
    """A loaded adapter and its origin.

    digest, size: SHA-256 and bytes of its file. hit: where it was found.
    """

    adapter: A
    digest: str
    source: str
    revision: str
    size: int
    trigger_words: tuple[str, ...]
    hit: Hit

    def describe(self) -> str:
        """All of it in a line for the log."""
        ignored = list(map(one_line, self.adapter.ignored))
        names = ", ".join(ignored[:_MAX_LISTED]) + (", ..." if len(ignored) > _MAX_LISTED else "")
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


class AdapterLoader(Generic[A]):
    """Loads adapters by reference, through a cache of files and one of parsed adapters.

    parse: reads a .safetensors file, given its path and SHA-256; raises ValueError for a bad one.
    For one thread at a time; several processes may share the directory of the cache.
    """

    def __init__(self, settings: LoaderSettings, parse: Callable[[Path, str], A]) -> None:
        self._settings = settings
        self._parse = parse
        self._client = HttpClient(settings.http)
        self._sources = Sources(settings.sources, self._client)
        hub_cache = settings.sources.hf_cache_dir
        self._cache = FileCache(settings.cache, lambda path: huggingface.remove(path, hub_cache))
        self._memory: _Memory[A] = _Memory(settings.memory_bytes)

    def close(self) -> None:
        """Close the connections kept open."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def load(self, text: str, check_cancelled: CheckCancelled = never_cancelled) -> Loaded[A]:
        """Return the adapter that a reference means now.

        Raises WeightsError with a message for the user, and whatever check_cancelled raises; it
        is called before each try and for each chunk of a download.
        """
        allowed = self._settings.sources.allow_local_paths
        reference = parse_reference(text, allow_local_paths=allowed)
        try:
            return self._deliver(*self._locate(reference, check_cancelled))
        except FileNotFoundError:  # evicted by another process since it was found
            return self._deliver(*self._locate(reference, check_cancelled))

    def _locate(self, reference: Reference, check_cancelled: CheckCancelled) -> tuple[Record, Hit]:
        """Find or fetch the file that a reference means now."""
        key = self._sources.key(reference)
        known = self._cache.find(key)
        if known is not None and reference.immutable:
            return known, "disk"
        retry = RetryPolicy(
            self._settings.attempts, self._settings.backoff, check_cancelled=check_cancelled
        )
        asking = retry if known is None else replace(retry, attempts=1)
        try:
            artifact = self._sources.resolve(reference, asking)
            record, hit = self._obtain(artifact, retry)
        except SourceUnavailableError as error:
            if known is None:
                raise
            logger.warning("%s Using the file from before, which may be out of date.", error)
            return known, "disk"
        self._cache.remember(key, replace(record, lasting=not is_presigned(reference)))
        return record, hit

    def _obtain(self, artifact: Artifact, retry: RetryPolicy) -> tuple[Record, Hit]:
        """Return the record of an artifact; one process fetches it, the others wait for it."""
        pin = artifact.pin or f"unpinned {uuid4()}"
        check_size(artifact.source, artifact.size, self._settings.http.max_bytes)
        with self._cache.fetching(pin, retry.check_cancelled) as target:
            known = self._cache.find(pin)
            if known is not None:
                return known, "disk"
            record = self._fetch(artifact, target, retry)
            if artifact.pin is not None:
                self._cache.remember(pin, record)
            return record, "download" if record.evictable else "disk"

    def _fetch(self, artifact: Artifact, target: Path, retry: RetryPolicy) -> Record:
        self._cache.make_room(artifact.size or 0)
        try:
            fetched = fetch(artifact, target, self._sources, retry)
        except OSError as error:
            if not is_full(error):
                raise
            raise DiskSpaceError(
                f"{artifact.source}: the disk is full. Free some space, or lower the budget of the "
                f"adapter cache."
            ) from error
        size = fetched.path.stat().st_size
        path = str(fetched.path)
        if not fetched.in_place:
            path = self._cache.adopt(fetched.path, fetched.sha256)
        return Record(
            sha256=fetched.sha256,
            size=size,
            path=path,
            source=artifact.source,
            revision=artifact.revision,
            trigger_words=_merged(artifact.trigger_words, fetched.trigger_words),
            evictable=fetched.evictable,
        )

    def _deliver(self, record: Record, hit: Hit) -> Loaded[A]:
        """Parse the file of a record, unless its adapter is in memory."""
        adapter = self._memory.get(record.sha256)
        if adapter is None:
            adapter = self._parsed(record)
            self._memory.put(record.sha256, adapter)
        elif hit == "disk":
            hit = "memory"
        return Loaded(
            adapter=adapter,
            digest=record.sha256,
            source=record.source,
            revision=record.revision,
            size=record.size,
            trigger_words=_merged(record.trigger_words, adapter.trigger_words),
            hit=hit,
        )

    def _parsed(self, record: Record) -> A:
        with self._cache.in_use(record) as path:
            try:
                return self._parse(path, record.sha256)
            except ValueError as error:
                raise InvalidFileError(f"{record.source}: {error}") from error


class _Memory(Generic[A]):
    """Parsed adapters by digest, the least recently used leaving first."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._adapters: OrderedDict[str, A] = OrderedDict()

    def get(self, digest: str) -> A | None:
        if digest in self._adapters:
            self._adapters.move_to_end(digest)
        return self._adapters.get(digest)

    def put(self, digest: str, adapter: A) -> None:
        self._adapters[digest] = adapter
        while sum(kept.nbytes for kept in self._adapters.values()) > self._budget:
            self._adapters.popitem(last=False)


def _merged(*groups: Sequence[str]) -> tuple[str, ...]:
    """All words once, in order."""
    words = (one_line(word) for group in groups for word in group)
    return tuple(dict.fromkeys(word for word in words if word))[:_MAX_WORDS]
