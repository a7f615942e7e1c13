"""A cache of files on disk, indexed by reference and by content.

    records/<hash of key>.json   the file that a reference, or a pinned artifact, stands for
    objects/<sha256>             the files, one for each content
    parts/<hash of key>          incomplete downloads; never a cache hit
    uses/<sha256>                locked while a file is read; its date is the last use
    locks/                       one for each download, and one for the index

Several processes may share the directory. Each download has a lock, so a second process waits and
then finds the file. Eviction, and marking a file as in use, happen under the lock of the index. A
file in use is marked by a shared flock, which is released even after a crash.

Some files are stored elsewhere, for example in the Hugging Face cache. They are recorded and never
copied. They are evicted through a function that the caller gives, and only if this cache had
downloaded them.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from weights.download.record import CacheRecord, read_record, write_record
from weights.serving.cancel import POLL_SECONDS, CheckCancelled, never_cancelled
from weights.serving.directories import existing, usable
from weights.serving.errors import DirectoryError, DiskSpaceError, InvalidFileError
from weights.serving.settings import GB, Settings

logger = logging.getLogger(__name__)

DIRECTORIES = ("records", "objects", "parts", "uses", "locks")
STRAY_SECONDS = 24 * 3600.0


@dataclass(frozen=True)
class CacheSettings:
    """Where files are kept, and the limits.

    Attributes:
        max_bytes: budget for all files together.
        min_free_bytes: what to leave free on the disk.
    """

    root: Path
    max_bytes: int = Settings.lora_cache_bytes
    min_free_bytes: int = 5 * GB


class FileCache:
    """A directory of files under a byte budget, safe to share between processes."""

    def __init__(
        self, settings: CacheSettings, remove_external: Callable[[Path], None] = Path.unlink
    ) -> None:
        self._settings = settings
        self._remove_external = remove_external
        self._root = settings.root
        try:
            self._open()
        except DirectoryError as error:  # a server without adapters needs no cache
            logger.warning("Adapters cannot be loaded: %s", error)

    def _open(self) -> None:
        """Make the directories; raises DirectoryError."""
        self._root = usable(self._settings.root, "FLUX_CACHE_DIRECTORY")
        for name in DIRECTORIES:
            (self._root / name).mkdir(exist_ok=True)

    def find(self, key: str) -> CacheRecord | None:
        """Return the record under a key if its file is there and whole, else None.

        Raises:
            DirectoryError: the cache's directory cannot be used.
        """
        if not all((self._root / name).is_dir() for name in DIRECTORIES):
            self._open()
        record = read_record(self._record_path(key))
        return record if record is not None and self._is_whole(record) else None

    def remember(self, key: str, record: CacheRecord) -> None:
        """Let a key lead to a record from now on; nothing is written if it does already."""
        path = self._record_path(key)
        if read_record(path) != record:
            write_record(path, record)

    @contextlib.contextmanager
    def fetching(
        self,
        key: str,
        check_cancelled: CheckCancelled = never_cancelled,
        *,
        resumable: bool = True,
    ) -> Iterator[Path]:
        """Hold the lock for downloading a key's file; yields the path to download to.

        Waits while another process fetches it. A part left there by an earlier try is kept.

        Args:
            resumable: whether a later call can go on with what a broken download leaves there.
        """
        target = self._root / "parts" / _name(key)
        with _acquired(self._lock(_name(key)), check_cancelled):
            try:
                yield target
            except BaseException as error:
                if not resumable or isinstance(error, InvalidFileError):
                    for path in target.parent.glob(f"{target.name}*"):
                        path.unlink()
                raise

    def adopt(self, file: Path, sha256: str) -> str:
        """Move a finished file into the cache and return its path for a CacheRecord."""
        path = f"objects/{sha256}"
        with self._books():
            file.replace(self._root / path)
            _touch(self._use_path(sha256))
        return path

    @contextlib.contextmanager
    def in_use(self, record: CacheRecord) -> Iterator[Path]:
        """Yield the path of a file that will not be evicted meanwhile.

        Raises:
            FileNotFoundError: it is gone.
        """
        with contextlib.ExitStack() as stack:
            with self._books():
                if not self._is_whole(record):
                    raise FileNotFoundError(record.path)
                mark = stack.enter_context(self._use_path(record.sha256).open("a"))
                fcntl.flock(mark, fcntl.LOCK_SH)
                _touch(self._use_path(record.sha256))
            yield self._path(record)

    def touch(self, record: CacheRecord) -> None:
        """Have a file count as used now, where that can be written."""
        with contextlib.suppress(OSError):
            _touch(self._use_path(record.sha256))

    def make_room(self, size: int = 0, directory: Path | None = None) -> None:
        """Evict what was not used for longest until `size` more bytes fit.

        Args:
            directory: where they go, if not into this cache; it may still have to be made.

        Raises:
            DiskSpaceError: the disk stays too full.
        """
        place = existing(directory or self._root)
        with self._books():
            self._drop_strays()
            self._drop_parts(size, place)
            records = self._evictable()
            total = sum(record.size for record in records)
            for record in records:
                over = total + size > self._settings.max_bytes
                if not over and self._short_of(size, place) <= 0:
                    break
                if (over or _share_a_disk(self._path(record), place)) and self._evict(record):
                    total -= record.size
            if (missing := self._short_of(size, place)) > 0:
                floor = self._settings.min_free_bytes / GB
                raise DiskSpaceError(
                    f"No room for {size / 1e6:.0f} MB: the disk of {place} is {missing / 1e6:.0f} "
                    f"MB short of it, with the {floor:g} GB that are always left free. Free some."
                )

    def _short_of(self, size: int, place: Path) -> int:
        return size + self._settings.min_free_bytes - shutil.disk_usage(place).free

    def _path(self, record: CacheRecord) -> Path:
        return self._root / record.path

    def _is_whole(self, record: CacheRecord) -> bool:
        path = self._path(record)
        return path.is_file() and path.stat().st_size == record.size

    def _evictable(self) -> list[CacheRecord]:
        """Every file that may be evicted, the least recently used first."""
        ours = {record.path: record for _, record in self._records() if record.evictable}
        present = [record for record in ours.values() if self._is_whole(record)]
        return sorted(present, key=lambda record: _modified(self._use_path(record.sha256)))

    def _evict(self, record: CacheRecord) -> bool:
        """Remove a file and its records unless it is in use; returns whether it was removed."""
        mark = self._use_path(record.sha256)
        with mark.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            path = self._path(record)
            (self._remove_external if Path(record.path).is_absolute() else Path.unlink)(path)
            mark.unlink(missing_ok=True)
        for entry, other in self._records():
            if other.path == record.path:
                entry.unlink(missing_ok=True)
        logger.info("Evicted %s (%.1f MB) from the cache", record.source, record.size / 1e6)
        return True

    def _records(self) -> list[tuple[Path, CacheRecord]]:
        entries = ((path, read_record(path)) for path in (self._root / "records").glob("*.json"))
        return [(path, record) for path, record in entries if record is not None]

    def _drop_strays(self) -> None:
        """Remove old parts, files without a record, records of presigned URLs, and free locks."""
        records = self._records()
        known = {record.path for _, record in records}
        brief = [path for path, record in records if not record.lasting]
        drafts = (self._root / "records").glob("*.draft")
        for path in filter(_is_old, [*brief, *drafts, *(self._root / "parts").iterdir()]):
            path.unlink(missing_ok=True)
        for path in filter(_is_old, (self._root / "objects").iterdir()):
            if f"objects/{path.name}" not in known:
                path.unlink(missing_ok=True)
                self._use_path(path.name).unlink(missing_ok=True)
        for path in filter(_is_old, (self._root / "locks").iterdir()):
            with contextlib.suppress(Timeout), FileLock(path, blocking=False):
                path.unlink(missing_ok=True)  # who has opened it finds that out, and makes another

    def _drop_parts(self, size: int, place: Path) -> None:
        """Remove broken downloads that nobody goes on with, until the disk has room for `size`."""
        for path in sorted((self._root / "parts").iterdir(), key=_modified):
            if self._short_of(size, place) <= 0 or not _share_a_disk(path, place):
                break
            lock = self._root / "locks" / f"{path.name.partition('.')[0]}.lock"
            with contextlib.suppress(Timeout), FileLock(lock, blocking=False):
                path.unlink(missing_ok=True)

    def _books(self) -> contextlib.AbstractContextManager[object]:
        return self._lock("books")

    def _lock(self, name: str) -> FileLock:
        return FileLock(self._root / "locks" / f"{name}.lock")

    def _record_path(self, key: str) -> Path:
        return self._root / "records" / f"{_name(key)}.json"

    def _use_path(self, sha256: str) -> Path:
        return self._root / "uses" / sha256


def _name(key: str) -> str:
    """A file name for a key; a hash, because keys may hold what must not be read."""
    return hashlib.sha256(key.encode()).hexdigest()


def _touch(path: Path) -> None:
    path.touch()
    os.utime(path)


def _modified(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


def _share_a_disk(one: Path, other: Path) -> bool:
    return one.stat().st_dev == other.stat().st_dev


def _is_old(path: Path) -> bool:
    return time.time() - _modified(path) > STRAY_SECONDS


@contextlib.contextmanager
def _acquired(lock: FileLock, check_cancelled: CheckCancelled) -> Iterator[None]:
    """Wait for a lock, asking now and then whether the request was cancelled."""
    while True:
        check_cancelled()
        try:
            lock.acquire(timeout=POLL_SECONDS, poll_interval=POLL_SECONDS / 2)
            break
        except Timeout:
            continue
    try:
        yield
    finally:
        lock.release()
